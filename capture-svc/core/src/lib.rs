//! Decisions of the capture service, free of I/O.
