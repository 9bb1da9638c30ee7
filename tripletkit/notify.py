"""Messages to a webhook when something ended."""
