//! Formats, and the pure decisions of the vault against naive models.

#[path = "it/format.rs"]
mod format;
#[path = "it/image.rs"]
mod image;
#[path = "it/samples.rs"]
mod samples;
