"""Messages to and from many: publish/subscribe and push/pull over the channels of any wire."""
