//! What knows which blocks of a volume changed, and shows the volume as it was at a cut.

mod error;
pub mod intercept;
mod volume_file;

pub use error::EngineError;
pub use intercept::*;
