//! Block devices served to clients: the device trait and the NBD server.
