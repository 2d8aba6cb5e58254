//! Tests of the capture service's decisions.

#[path = "it/formats.rs"]
mod formats;
#[path = "it/model.rs"]
mod model;
#[path = "it/rules.rs"]
mod rules;
#[path = "it/sim.rs"]
mod sim;
