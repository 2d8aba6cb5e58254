//! The tidemark command.
