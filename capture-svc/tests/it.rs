//! Tests of the capture service on real files.

#[path = "it/engine.rs"]
mod engine;
