//! `tidemark scrub --stored`: what the vault's scrub finds.

use serde::Serialize;
use tidemark_proto::vault::v1::{DamagedObject, ScrubEnd, ScrubRequest, scrub_response::Message};

use crate::{
    args::Global,
    failure::{Failure, Kind},
    format, output,
    progress::Progress,
};

/// What a pass found.
#[derive(Debug, Serialize)]
struct Found {
    /// The volume, as it was asked for.
    volume: String,
    objects: u64,
    bytes: u64,
    damaged_objects: u64,
    /// At most a thousand of them.
    damaged: Vec<Damaged>,
}

#[derive(Debug, Serialize)]
struct Damaged {
    /// Its name in the store.
    object: String,
    problem: String,
    /// The retained generations that need the damaged part.
    generations: Vec<u64>,
    /// The vault knew what it said, and has written it again.
    repaired: bool,
}

pub(super) async fn run(global: &Global, volume: String) -> Result<(), Failure> {
    let request = ScrubRequest {
        volume: volume.clone(),
    };
    let mut vault = global.vault().await?;
    let progress = Progress::spinner("reading");
    let mut answers = vault.scrub(request).await?.into_inner();
    loop {
        match answers.message().await?.map(|answer| answer.message) {
            Some(Some(Message::Progress(now))) => progress.say(format!(
                "reading: {} of {}, {} objects",
                format::bytes(now.bytes_done),
                format::bytes(now.bytes_total),
                now.objects_done
            )),
            Some(Some(Message::End(end))) => {
                drop(progress);
                let found = Found::new(volume, end);
                output::print(global.json, &found, &found.describe())?;
                return found.verdict();
            }
            Some(None) | None => return Err(Failure::protocol("a scrub without an end")),
        }
    }
}

impl Found {
    fn new(volume: String, end: ScrubEnd) -> Self {
        Self {
            volume,
            objects: end.objects,
            bytes: end.bytes,
            damaged_objects: end.damaged_objects,
            damaged: end.damaged.into_iter().map(Damaged::new).collect(),
        }
    }

    fn describe(&self) -> String {
        let mut text = format!(
            "{}: {} objects, {} verified; {} damaged\n",
            self.volume,
            self.objects,
            format::bytes(self.bytes),
            self.damaged_objects
        );
        for damaged in &self.damaged {
            text.push_str(&damaged.describe());
        }
        text
    }

    fn verdict(&self) -> Result<(), Failure> {
        if self.damaged_objects == 0 {
            return Ok(());
        }
        let mut hit: Vec<u64> = self
            .damaged
            .iter()
            .flat_map(|damaged| damaged.generations.iter().copied())
            .collect();
        hit.sort_unstable();
        hit.dedup();
        let action = if hit.is_empty() {
            "every generation can still be read; look at the disk of the vault's store".to_owned()
        } else {
            format!(
                "generations {} can't be read whole: use others, and look at the disk of the vault's store; \
                 the next interval that changes the damaged blocks mends the newest image",
                hit.iter()
                    .map(u64::to_string)
                    .collect::<Vec<_>>()
                    .join(", ")
            )
        };
        Err(Failure::new(
            Kind::Corrupt,
            "STORE_CORRUPT",
            format!(
                "{} objects that the vault stores of {} are damaged",
                self.damaged_objects, self.volume
            ),
            action,
        ))
    }
}

impl Damaged {
    fn new(damaged: DamagedObject) -> Self {
        Self {
            object: damaged.object,
            problem: damaged.problem,
            generations: damaged.generations,
            repaired: damaged.repaired,
        }
    }

    fn describe(&self) -> String {
        let needed = match &self.generations[..] {
            _ if self.repaired => "written again".to_owned(),
            [] => "no generation needs it".to_owned(),
            generations => {
                let generations: Vec<_> = generations.iter().map(u64::to_string).collect();
                format!("needed by generations {}", generations.join(", "))
            }
        };
        format!("{}: {}; {needed}\n", self.object, self.problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn damaged(generations: Vec<u64>, repaired: bool) -> DamagedObject {
        DamagedObject {
            object: "volumes/v/segments/s/00000000".into(),
            problem: "its frame at byte 88: no frame begins here".into(),
            generations,
            repaired,
        }
    }

    fn found(damaged: Vec<DamagedObject>) -> Found {
        let end = ScrubEnd {
            objects: 12,
            bytes: 34 << 20,
            damaged_objects: damaged.len() as u64,
            damaged,
        };
        Found::new("data".into(), end)
    }

    #[test]
    fn what_is_damaged_is_named_with_the_generations_that_need_it() {
        assert!(found(Vec::new()).verdict().is_ok());
        let found = found(vec![
            damaged(vec![3, 4], false),
            damaged(Vec::new(), false),
            damaged(Vec::new(), true),
        ]);
        insta::assert_snapshot!(found.describe());
        insta::assert_json_snapshot!(found);
        let failure = found.verdict().unwrap_err();
        assert_eq!(failure.kind(), Kind::Corrupt);
        insta::assert_snapshot!(failure.to_string());
    }
}
