//! Decisions and formats of the vault service, free of I/O.
