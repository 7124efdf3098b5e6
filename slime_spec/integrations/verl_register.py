"""The import of this module, which VERL_USE_EXTERNAL_MODULES has verl do, makes verl's servers count."""

from slime_spec.integrations.verl_servers import register

register()
