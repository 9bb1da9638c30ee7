"""Where a result comes from: configuration, code, data, machine."""
