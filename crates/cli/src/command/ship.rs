//! `tidemark ship`.

use std::time::{Duration, Instant};

use tidemark_proto::capture::v1::{
    TriggerIntervalRequest, Uplink, trigger_interval_response::Message,
};

use crate::{
    args::{Global, ShipArgs},
    failure::{Failure, Kind},
    format, output,
    progress::Progress,
    report::{Receipt, graded},
};

pub(super) async fn run(global: &Global, args: ShipArgs) -> Result<(), Failure> {
    let mut capture = global.capture().await?;
    let request = TriggerIntervalRequest {
        volume: args.volume.clone(),
    };
    let progress = Progress::spinner("cutting");
    let mut answers = capture.trigger_interval(request).await?.into_inner();
    let mut trouble = Trouble::default();
    loop {
        let answer = tokio::select! {
            answer = answers.message() => answer?,
            () = trouble.lasts(args.wait_for_vault) => return Err(trouble.failure(&args.volume)),
        };
        match answer.map(|answer| answer.message) {
            Some(Some(Message::Progress(uplink))) => {
                progress.say(doing(&uplink));
                trouble.hear(uplink.error, Instant::now());
            }
            Some(Some(Message::Receipt(receipt))) => {
                drop(progress);
                let receipt = Receipt::new(&args.volume, &receipt)?;
                return output::print(global.json, &receipt, &describe(&receipt));
            }
            Some(None) => return Err(Failure::protocol("an empty answer to ship")),
            None => {
                return Err(waits(&format!(
                    "the capture service went away before {}'s interval was committed",
                    args.volume
                )));
            }
        }
    }
}

/// What keeps the uplink from shipping, and since when.
#[derive(Debug, Default)]
struct Trouble {
    error: String,
    since: Option<Instant>,
}

impl Trouble {
    /// `error` is the uplink's last failure; empty after a success.
    fn hear(&mut self, error: String, now: Instant) {
        self.since = match (error.is_empty(), self.since) {
            (true, _) => None,
            (false, since) => since.or(Some(now)),
        };
        self.error = error;
    }

    /// Ends once there has been trouble for this long.
    async fn lasts(&self, limit: Duration) {
        match self.since {
            Some(since) => tokio::time::sleep_until((since + limit).into()).await,
            None => std::future::pending().await,
        }
    }

    fn failure(&self, volume: &str) -> Failure {
        waits(&format!(
            "{volume}'s interval is not committed yet: {}",
            self.error
        ))
    }
}

fn waits(message: &str) -> Failure {
    Failure::new(
        Kind::Unavailable,
        "UNREACHABLE",
        message,
        "nothing is lost: it ships by itself as soon as both services run; see `tidemark status`",
    )
}

fn doing(uplink: &Uplink) -> String {
    let error = if uplink.error.is_empty() {
        String::new()
    } else {
        format!("  {}", uplink.error)
    };
    format!(
        "shipping: {} of {} blocks, {} sent{error}",
        uplink.blocks_done,
        uplink.blocks_total,
        format::bytes(uplink.bytes_sent)
    )
}

/// A receipt for people.
pub(super) fn describe(receipt: &Receipt) -> String {
    let mut fields = vec![(
        "generation",
        if receipt.created {
            format!("{}@{}", receipt.volume, receipt.generation)
        } else {
            format!(
                "{}@{} (nothing has changed)",
                receipt.volume, receipt.generation
            )
        },
    )];
    fields.extend([
        ("image digest", receipt.image_digest.clone()),
        ("changed", format!("{} blocks", receipt.changed_blocks)),
        ("sent", format::bytes(receipt.bytes_sent)),
        (
            "coherence",
            graded(receipt.coherence, &receipt.coherence_reason),
        ),
        ("cut", format::time(receipt.cut_time)),
        ("committed", format::time(receipt.committed_time)),
    ]);
    format::fields(&fields)
}

#[cfg(test)]
mod tests {
    use tidemark_proto::common::v1 as common;

    use super::*;

    fn receipt(created: bool) -> Receipt {
        Receipt::new(
            "data",
            &common::Receipt {
                volume_id: vec![0x11; 16].into(),
                interval_id: vec![0x22; 16].into(),
                generation: 7,
                created,
                image_digest: vec![0xab; 16].into(),
                changed_blocks: 12,
                frame_bytes: 20_000,
                cut_time_ms: 1_793_337_404_000,
                committed_time_ms: 1_793_337_405_250,
                coherence: common::Coherence::Lull.into(),
                trigger: common::Trigger::Request.into(),
                coherence_reason: "the last write was not flushed".into(),
            },
        )
        .unwrap()
    }

    #[test]
    fn a_receipt_is_printed_for_people_and_for_programs() {
        insta::assert_snapshot!(describe(&receipt(true)));
        insta::assert_json_snapshot!(receipt(true));
    }

    #[test]
    fn trouble_counts_from_its_first_failure_until_a_success() {
        let begin = Instant::now();
        let later = begin + Duration::from_secs(9);
        let mut trouble = Trouble::default();
        trouble.hear("refused".into(), begin);
        trouble.hear("timed out".into(), later);
        assert_eq!(trouble.since, Some(begin));
        let told = trouble.failure("data").to_string();
        assert!(told.contains("not committed yet: timed out"), "{told}");
        trouble.hear(String::new(), later);
        assert_eq!(trouble.since, None);
    }

    #[test]
    fn an_interval_without_changes_says_so() {
        assert!(describe(&receipt(false)).contains("data@7 (nothing has changed)"));
    }
}
