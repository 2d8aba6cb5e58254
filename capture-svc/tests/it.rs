//! Tests of the capture service on real files, and against a whole vault.

#[path = "it/engine.rs"]
mod engine;
#[path = "it/nbd.rs"]
mod nbd;
#[path = "it/proxy.rs"]
mod proxy;
#[path = "it/rig.rs"]
mod rig;
#[path = "it/shipping.rs"]
mod shipping;
