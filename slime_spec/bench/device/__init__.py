"""The benchmark of the device needs no checkpoint: the device's own limits, passes of models of known shapes, IPC."""
