//! Both services as release programs, their control interface, and what memory they take.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use tidemark_integration::{args, programs::Split};
use tidemark_proto::{
    capture::v1::{
        TriggerIntervalRequest, capture_client::CaptureClient, trigger_interval_response::Message,
    },
    common::v1::Receipt,
};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

use crate::report::{Bound, Report};

const MIB: f64 = 1_048_576.0;
/// What neither service may pass, whatever the figure.
const MEMORY_MIB_MAX: f64 = 150.0;

pub(crate) struct Services {
    pub(crate) split: Split,
    runtime: Runtime,
    client: CaptureClient<Channel>,
    memory: Memory,
}

impl Services {
    /// Starts both in `dir`; nothing ships, scrubs or expires by itself.
    pub(crate) fn start(dir: &Path, capture_flags: &[&str]) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let mut split = Split::new(dir);
        split.capture_flags = [
            "--interval-max=1day",
            "--scrub-period=0s",
            "--log-filter=warn",
        ]
        .iter()
        .chain(capture_flags)
        .map(ToString::to_string)
        .collect();
        split.vault_flags = vec!["--log=warn".into()];
        split.start_vault();
        split.start_capture();
        let memory = Memory::watch([split.capture_pid(), split.vault_pid()]);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let client =
            runtime.block_on(Endpoint::from_shared(split.cli.capture.clone())?.connect())?;
        let client = CaptureClient::new(client);
        Ok(Self {
            split,
            runtime,
            client,
            memory,
        })
    }

    /// A volume on a sparse file, made where it is missing.
    pub(crate) fn add(&self, name: &str, file: &Path, size: u64) {
        self.split.cli.json(args![
            "volume",
            "add",
            name,
            "--file",
            file,
            "--size",
            size.to_string()
        ]);
    }

    /// Cuts, ships, and waits for the receipt.
    pub(crate) fn ship(&mut self, volume: &str) -> Result<Receipt> {
        self.runtime.block_on(async {
            let mut answers = self
                .client
                .trigger_interval(TriggerIntervalRequest {
                    volume: volume.into(),
                })
                .await?
                .into_inner();
            while let Some(answer) = answers.message().await? {
                if let Some(Message::Receipt(receipt)) = answer.message {
                    return Ok(receipt);
                }
            }
            bail!("the stream ended without a receipt")
        })
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.split.socket.clone()
    }

    /// Reports the peaks of memory since the start, and ends both services.
    pub(crate) fn stop(self, what: &str, report: &mut Report) {
        for (service, bytes) in ["capture", "vault"].into_iter().zip(self.end()) {
            report.alone(
                &format!("{what}: peak RssAnon + RssShmem, {service}"),
                "MiB",
                bytes / MIB,
                Bound::AtMost(MEMORY_MIB_MAX),
            );
        }
    }

    /// Ends both services; the peaks of memory since the start, of capture and vault service, in bytes.
    pub(crate) fn end(self) -> [f64; 2] {
        let peaks = self.memory.stop();
        self.split.stop();
        peaks
    }
}

/// Watches the anonymous and shared memory of two processes.
struct Memory {
    end: Arc<AtomicBool>,
    peaks: Arc<[AtomicU64; 2]>,
    thread: JoinHandle<()>,
}

impl Memory {
    fn watch(pids: [u32; 2]) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let peaks = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let thread = std::thread::spawn({
            let (end, peaks) = (Arc::clone(&end), Arc::clone(&peaks));
            move || {
                while !end.load(Ordering::Relaxed) {
                    for (pid, peak) in pids.iter().zip(peaks.iter()) {
                        // A process that has ended has no more peaks.
                        if let Ok(kib) = resident_kib(*pid) {
                            peak.fetch_max(kib, Ordering::Relaxed);
                        }
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        });
        Self { end, peaks, thread }
    }

    /// Peaks in bytes.
    fn stop(self) -> [f64; 2] {
        self.end.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        #[allow(clippy::cast_precision_loss, reason = "figures")]
        [0, 1].map(|n: usize| self.peaks[n].load(Ordering::Relaxed) as f64 * 1024.0)
    }
}

/// RssAnon + RssShmem of a process, as proc(5) has them.
fn resident_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    ["RssAnon:", "RssShmem:"]
        .iter()
        .map(|key| {
            let line = status
                .lines()
                .find(|line| line.starts_with(key))
                .context("no such line")?;
            line.split_whitespace()
                .nth(1)
                .context("no number")?
                .parse::<u64>()
                .context("no number")
        })
        .sum()
}
