//! Formats, and the pure decisions of the vault against naive models.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::disallowed_methods,
    reason = "tests"
)]

#[path = "it/format.rs"]
mod format;
#[path = "it/image.rs"]
mod image;
#[path = "../../../crates/block/tests/it/page.rs"]
mod page;
#[path = "it/resume.rs"]
mod resume;
#[path = "it/retention.rs"]
mod retention;
#[path = "it/samples.rs"]
mod samples;
#[path = "it/scrub.rs"]
mod scrub;
