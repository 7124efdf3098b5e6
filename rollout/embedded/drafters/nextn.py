"""NEXTN: the target's own multi-token prediction layer drafts (DeepSeek-V3's MTP in MiMo's dense form).

Only the first MTP layer is used; steps beyond the first reuse it on its own output, as SGLang does.
"""

from __future__ import annotations

from rollout.embedded.drafters.eagle import EagleDrafter


class NextNDrafter(EagleDrafter):
    """MTP layers inside a target's checkpoint, or in a folder of their own; in SGLang EAGLE is another name for it."""
