//! The capture service.
