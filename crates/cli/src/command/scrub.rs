//! `tidemark scrub`.

mod stored;

use serde::Serialize;
use tidemark_proto::capture::v1::{ScrubEnd, ScrubVolumeRequest, scrub_volume_response::Message};

use crate::{
    args::{Global, ScrubArgs},
    failure::{Failure, Kind},
    output,
    progress::Progress,
};

/// What a pass found.
#[derive(Debug, Serialize)]
struct Found {
    /// The volume, as it was asked for.
    volume: String,
    compared_blocks: u64,
    /// Not compared: they have changed since the newest generation, or are in doubt.
    changed_blocks: u64,
    mismatches: u64,
}

pub(super) async fn run(global: &Global, args: ScrubArgs) -> Result<(), Failure> {
    if args.stored {
        return stored::run(global, args.volume).await;
    }
    let request = ScrubVolumeRequest {
        volume: args.volume.clone(),
    };
    let mut capture = global.capture().await?;
    let progress = Progress::spinner("reading");
    let mut answers = capture.scrub_volume(request).await?.into_inner();
    loop {
        match answers.message().await?.map(|answer| answer.message) {
            Some(Some(Message::Progress(now))) => progress.say(format!(
                "reading: {} of {} blocks",
                now.blocks_done, now.blocks_total
            )),
            Some(Some(Message::End(end))) => {
                drop(progress);
                let found = Found::new(args.volume, &end);
                output::print(global.json, &found, &found.describe())?;
                return found.verdict();
            }
            Some(None) | None => return Err(Failure::protocol("a scrub without an end")),
        }
    }
}

impl Found {
    fn new(volume: String, end: &ScrubEnd) -> Self {
        Self {
            volume,
            compared_blocks: end.blocks_compared,
            changed_blocks: end.blocks_changed,
            mismatches: end.mismatches,
        }
    }

    fn describe(&self) -> String {
        format!(
            "{}: {} blocks compared, {} differ; {} left out, which have changed since the newest generation\n",
            self.volume, self.compared_blocks, self.mismatches, self.changed_blocks
        )
    }

    fn verdict(&self) -> Result<(), Failure> {
        if self.mismatches == 0 {
            return Ok(());
        }
        Err(Failure::new(
            Kind::Corrupt,
            "SCRUB_MISMATCH",
            format!(
                "{} blocks of {} are not what was shipped, though no change of them was seen",
                self.mismatches, self.volume
            ),
            "they are in the next interval now; look for whoever writes to the volume file past its NBD export",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrub_that_found_something_is_told_and_fails() {
        let end = ScrubEnd {
            blocks_compared: 90,
            blocks_changed: 10,
            mismatches: 0,
        };
        let found = Found::new("data".into(), &end);
        assert!(found.verdict().is_ok());
        assert!(
            found
                .describe()
                .starts_with("data: 90 blocks compared, 0 differ; 10 left out")
        );
        let end = ScrubEnd {
            mismatches: 2,
            ..end
        };
        let failure = Found::new("data".into(), &end).verdict().unwrap_err();
        assert_eq!(failure.kind(), Kind::Corrupt);
        assert!(
            failure.to_string().contains("2 blocks of data"),
            "{failure}"
        );
    }
}
