//! `tidemark snapshot rollback`.

use std::time::Instant;

use serde::Serialize;
use tidemark_proto::capture::v1::{
    RollbackEnd, RollbackVolumeRequest, rollback_volume_response::Message,
};

use super::restore::geometry;
use crate::{args::Global, failure::Failure, format, output, progress::Progress};

/// What was done.
#[derive(Debug, Serialize)]
struct RolledBack {
    /// The volume, as it was asked for.
    volume: String,
    /// What it is now.
    snapshot: u64,
    /// What it was before; `null` where nothing differed.
    kept_snapshot: Option<u64>,
    changed_blocks: u64,
    /// Bytes of these blocks.
    changed_bytes: u64,
    /// Milliseconds.
    took_ms: u64,
}

pub(super) async fn run(
    global: &Global,
    volume: String,
    snapshot: u64,
    force: bool,
) -> Result<(), Failure> {
    let began = Instant::now();
    let request = RollbackVolumeRequest {
        volume: volume.clone(),
        snapshot,
        force,
    };
    let mut capture = global.capture().await?;
    let progress = Progress::spinner("rolling back");
    let mut answers = capture.rollback_volume(request).await?.into_inner();
    loop {
        match answers.message().await?.map(|answer| answer.message) {
            Some(Some(Message::Progress(now))) => progress.say(format!(
                "rolling back: {} of {} blocks",
                now.blocks_done, now.blocks_total
            )),
            Some(Some(Message::End(end))) => {
                drop(progress);
                let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                let done = RolledBack::new(volume, snapshot, &end, took_ms)?;
                return output::print(global.json, &done, &done.describe());
            }
            Some(None) | None => return Err(Failure::protocol("a rollback without an end")),
        }
    }
}

impl RolledBack {
    fn new(
        volume: String,
        snapshot: u64,
        end: &RollbackEnd,
        took_ms: u64,
    ) -> Result<Self, Failure> {
        let block_size = geometry(end.geometry.as_ref())?.block_size().get();
        Ok(Self {
            volume,
            snapshot,
            kept_snapshot: (end.kept_snapshot > 0).then_some(end.kept_snapshot),
            changed_blocks: end.changed_blocks,
            changed_bytes: end.changed_blocks.saturating_mul(u64::from(block_size)),
            took_ms,
        })
    }

    fn describe(&self) -> String {
        match self.kept_snapshot {
            None => format!(
                "{} is what it was at snapshot {} already\n",
                self.volume, self.snapshot
            ),
            Some(kept) => format!(
                "{} is what it was at snapshot {}: {} blocks ({}) were put back; snapshot {kept} has what it was before\n",
                self.volume,
                self.snapshot,
                self.changed_blocks,
                format::bytes(self.changed_bytes),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use tidemark_proto::common::v1::Geometry;

    use super::*;

    fn done(kept_snapshot: u64, changed_blocks: u64) -> RolledBack {
        let end = RollbackEnd {
            kept_snapshot,
            changed_blocks,
            geometry: Some(Geometry {
                length: 1 << 20,
                block_size: 4096,
            }),
        };
        RolledBack::new("data".into(), 3, &end, 7).unwrap()
    }

    #[test]
    fn what_was_done_is_printed_for_people_and_for_programs() {
        insta::assert_snapshot!(done(5, 12).describe(), @"data is what it was at snapshot 3: 12 blocks (48 KiB) were put back; snapshot 5 has what it was before");
        insta::assert_snapshot!(done(0, 0).describe(), @"data is what it was at snapshot 3 already");
        insta::assert_snapshot!(serde_json::to_string(&done(5, 12)).unwrap(), @r#"{"volume":"data","snapshot":3,"kept_snapshot":5,"changed_blocks":12,"changed_bytes":49152,"took_ms":7}"#);
    }
}
