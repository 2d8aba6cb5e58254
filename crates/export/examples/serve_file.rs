//! Serves a plain file, or memory, by NBD: for measuring the server alone, and for trying clients.
//!
//! `serve_file ADDRESS file PATH` or `serve_file ADDRESS memory BYTES`, where ADDRESS is `unix:PATH` or `HOST:PORT`.
//! It serves until its standard input ends. `SPIN_US` in the environment sets `spin_max`.

#![allow(
    clippy::cast_possible_truncation,
    reason = "a development tool for 64-bit machines"
)]

#[path = "../tests/it/devices.rs"]
mod devices;

use std::error::Error;
use std::fs::OpenOptions;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use tidemark_export::nbd::Limits;
use tidemark_export::{BlockDevice, ExportRegistry, NbdAddress, NbdServer};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, address, kind, what] = &args[..] else {
        return Err("usage: serve_file ADDRESS file PATH | serve_file ADDRESS memory BYTES".into());
    };
    let device: Arc<dyn BlockDevice> = match kind.as_str() {
        "file" => {
            let file = OpenOptions::new().read(true).write(true).open(what)?;
            Arc::new(devices::FileDevice::new(file)?)
        }
        "memory" => Arc::new(devices::MemoryDevice::new(what.parse()?)),
        other => return Err(format!("{other:?} is neither file nor memory").into()),
    };
    let registry = Arc::new(ExportRegistry::new());
    registry.add("data", "an example", device)?;
    let address: NbdAddress = address.parse()?;
    let spin_us = std::env::var("SPIN_US")
        .ok()
        .map_or(Ok(0), |text| text.parse())?;
    let limits = Limits {
        spin_max: Duration::from_micros(spin_us),
        ..Limits::default()
    };
    let server = NbdServer::start(registry, &[address], limits)?;
    for address in server.addresses() {
        println!("serving at {address}");
    }
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop(Duration::from_secs(5));
    Ok(())
}
