//! Workloads of fio, and what it saw of them.

use std::ffi::OsStr;

use anyhow::{Context, Result};
use serde_json::Value;
use tidemark_integration::programs::run;

/// A workload.
pub(crate) struct Job {
    pub(crate) what: &'static str,
    pub(crate) rw: &'static str,
    pub(crate) block: &'static str,
    pub(crate) depth: u32,
}

/// What fio saw of one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) iops: f64,
    /// Latency that one request in a thousand exceeds, in microseconds.
    pub(crate) p999_us: f64,
}

impl Job {
    /// Runs it for some seconds on a file or an export of `size` bytes, which fio's options `on` name.
    pub(crate) fn run(&self, on: &[String], size: u64, seconds: u32) -> Result<Seen> {
        let mut options = vec![
            "--name=figures".to_owned(),
            format!("--rw={}", self.rw),
            format!("--bs={}", self.block),
            format!("--iodepth={}", self.depth),
            format!("--size={size}"),
            "--time_based".to_owned(),
            format!("--runtime={seconds}"),
            "--randrepeat=0".to_owned(),
            "--output-format=json".to_owned(),
        ];
        options.extend_from_slice(on);
        let options: Vec<_> = options.iter().map(OsStr::new).collect();
        let told = run("fio", &options);
        // fio says things before the object.
        let json = told.find('{').context("fio printed no JSON")?;
        let told: Value = serde_json::from_str(&told[json..])?;
        let kind = if self.rw.ends_with("write") {
            "write"
        } else {
            "read"
        };
        let seen = &told["jobs"][0][kind];
        let iops = seen["iops"].as_f64().context("fio gave no IOPS")?;
        let p999 = seen["clat_ns"]["percentile"]["99.900000"]
            .as_f64()
            .context("fio gave no percentile")?;
        Ok(Seen {
            iops,
            p999_us: p999 / 1e3,
        })
    }
}
