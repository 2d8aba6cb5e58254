//! `tidemark scrub --stored`: what the vault's scrub finds.

use serde::Serialize;
use tidemark_proto::vault::v1::{
    DamagedObject, NeededFor, ScrubEnd, ScrubRequest, scrub_response::Message,
};

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
    /// Those that were written again are among them.
    damaged_objects: u64,
    repaired_objects: u64,
    /// All retained generations that can't be read whole.
    damaged_generations: Vec<u64>,
    /// At most a thousand of them.
    damaged: Vec<Damaged>,
}

#[derive(Debug, Serialize)]
struct Damaged {
    /// Its name in the store.
    object: String,
    problem: String,
    /// The first retained generations that need the damaged part.
    generations: Vec<u64>,
    /// How many others need it.
    more_generations: u64,
    /// What needs it beside them.
    needed_for: &'static str,
    /// The vault knew what it said, and has written it again.
    repaired: bool,
    #[serde(skip)]
    need: NeededFor,
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
            repaired_objects: end.repaired_objects,
            damaged_generations: end.damaged_generations,
            damaged: end.damaged.into_iter().map(Damaged::new).collect(),
        }
    }

    const fn all_repaired(&self) -> bool {
        self.damaged_objects == self.repaired_objects
    }

    fn describe(&self) -> String {
        let mut text = format!(
            "{}: {} objects, {} verified; {} damaged",
            self.volume,
            self.objects,
            format::bytes(self.bytes),
            self.damaged_objects
        );
        if self.repaired_objects > 0 {
            text.push_str(&format!(", {} written again", self.repaired_objects));
        }
        text.push('\n');
        for damaged in &self.damaged {
            text.push_str(&damaged.describe());
        }
        if self.damaged_objects > 0 && self.all_repaired() {
            text.push_str(
                "all that was damaged has been written again, and nothing is lost; \
                 look at the disk of the vault's store before more is damaged\n",
            );
        }
        text
    }

    fn verdict(&self) -> Result<(), Failure> {
        if self.all_repaired() {
            return Ok(());
        }
        let mut action = Vec::new();
        if !self.damaged_generations.is_empty() {
            action.push(format!(
                "generations {} can't be read whole: use others; the next interval that changes the damaged blocks \
                 mends the newest image",
                numbers(&self.damaged_generations)
            ));
        }
        for need in [
            NeededFor::Start,
            NeededFor::Volume,
            NeededFor::ChecksumTable,
        ] {
            let is_hit = |damaged: &Damaged| damaged.need == need && !damaged.repaired;
            if self.damaged.iter().any(is_hit) {
                action.extend(what_to_do(need).map(str::to_owned));
            }
        }
        if action.is_empty() {
            action.push("every generation can still be read, and new ones are taken".to_owned());
        }
        action.push("look at the disk of the vault's store".to_owned());
        Err(Failure::new(
            Kind::Corrupt,
            "STORE_CORRUPT",
            format!(
                "{} objects that the vault stores of {} are damaged",
                self.damaged_objects - self.repaired_objects,
                self.volume
            ),
            action.join("; "),
        ))
    }
}

/// What to do while something isn't there that is needed for this.
const fn what_to_do(need: NeededFor) -> Option<&'static str> {
    match need {
        NeededFor::Start => {
            Some("keep the vault running, without its store's marker it doesn't start again")
        }
        NeededFor::Volume => {
            Some("keep the vault running, it can't open the volume when it starts again")
        }
        NeededFor::ChecksumTable => Some(
            "keep the vault's state directory, without the checksum table in it nothing more is committed",
        ),
        NeededFor::CurrentThrough | NeededFor::Nothing | NeededFor::Unspecified => None,
    }
}

/// Ascending numbers, runs of them as one: `3, 5 to 9`.
fn numbers(ascending: &[u64]) -> String {
    let runs = ascending.chunk_by(|a, b| a.checked_add(1) == Some(*b));
    let told: Vec<_> = runs
        .map(|run| match run {
            [first, _, .., last] => format!("{first} to {last}"),
            run => run
                .iter()
                .map(u64::to_string)
                .collect::<Vec<_>>()
                .join(", "),
        })
        .collect();
    told.join(", ")
}

impl Damaged {
    fn new(damaged: DamagedObject) -> Self {
        let need = damaged.needed_for();
        Self {
            object: damaged.object,
            problem: damaged.problem,
            generations: damaged.generations,
            more_generations: damaged.more_generations,
            needed_for: match need {
                NeededFor::Unspecified => "",
                NeededFor::Nothing => "nothing",
                NeededFor::Start => "start",
                NeededFor::Volume => "volume",
                NeededFor::ChecksumTable => "checksum_table",
                NeededFor::CurrentThrough => "current_through",
            },
            repaired: damaged.repaired,
            need,
        }
    }

    fn describe(&self) -> String {
        format!("{}: {}; {}\n", self.object, self.problem, self.needed())
    }

    fn needed(&self) -> String {
        if self.repaired {
            return "written again".to_owned();
        }
        let mut needed = Vec::new();
        if !self.generations.is_empty() {
            let more = match self.more_generations {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            needed.push(format!(
                "needed by generations {}{more}",
                numbers(&self.generations)
            ));
        }
        let beside = match self.need {
            NeededFor::Start => "needed for the vault's next start",
            NeededFor::Volume => "needed to open the volume at the vault's next start",
            NeededFor::ChecksumTable => {
                "needed to make the vault's checksum table anew, should that be lost"
            }
            NeededFor::CurrentThrough => "needed to know until when the newest image was current",
            NeededFor::Nothing if needed.is_empty() => "no generation needs it",
            NeededFor::Nothing | NeededFor::Unspecified => "",
        };
        needed.extend((!beside.is_empty()).then(|| beside.to_owned()));
        needed.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn damaged(generations: Vec<u64>, need: NeededFor) -> DamagedObject {
        DamagedObject {
            object: "volumes/v/segments/s/00000000".into(),
            problem: "its frame at byte 88: no frame begins here".into(),
            generations,
            repaired: false,
            more_generations: 0,
            needed_for: need.into(),
        }
    }

    fn repaired(need: NeededFor) -> DamagedObject {
        DamagedObject {
            object: "store".into(),
            problem: "it is missing from the store".into(),
            repaired: true,
            ..damaged(Vec::new(), need)
        }
    }

    fn found(damaged: Vec<DamagedObject>) -> Found {
        let hit = damaged.iter().flat_map(|damaged| &damaged.generations);
        let end = ScrubEnd {
            objects: 12,
            bytes: 34 << 20,
            damaged_objects: damaged.len() as u64,
            repaired_objects: damaged.iter().filter(|damaged| damaged.repaired).count() as u64,
            damaged_generations: hit.copied().collect(),
            damaged,
        };
        Found::new("data".into(), end)
    }

    #[test]
    fn what_is_damaged_is_named_with_the_generations_that_need_it() {
        assert!(found(Vec::new()).verdict().is_ok());
        let found = found(vec![
            DamagedObject {
                more_generations: 7,
                ..damaged(vec![3, 4, 6, 7, 8], NeededFor::Nothing)
            },
            damaged(Vec::new(), NeededFor::Nothing),
            repaired(NeededFor::Start),
        ]);
        insta::assert_snapshot!(found.describe());
        insta::assert_json_snapshot!(found);
        let failure = found.verdict().unwrap_err();
        assert_eq!(failure.kind(), Kind::Corrupt);
        insta::assert_snapshot!(failure.to_string());
    }

    #[test]
    fn what_was_written_again_is_told_and_is_no_failure() {
        let found = found(vec![
            repaired(NeededFor::Start),
            repaired(NeededFor::ChecksumTable),
        ]);
        assert!(found.verdict().is_ok());
        insta::assert_snapshot!(found.describe());
    }

    #[test]
    fn what_a_damaged_object_is_needed_for_is_said_where_every_generation_can_be_read_now() {
        let told = |need| {
            let found = found(vec![damaged(Vec::new(), need)]);
            format!("{}{}\n", found.describe(), found.verdict().unwrap_err())
        };
        let all = [
            NeededFor::Start,
            NeededFor::Volume,
            NeededFor::ChecksumTable,
            NeededFor::CurrentThrough,
            NeededFor::Nothing,
        ];
        insta::assert_snapshot!(all.map(told).concat());
    }

    #[test]
    fn runs_of_numbers_are_told_as_one() {
        for (all, told) in [
            (&[][..], ""),
            (&[3], "3"),
            (&[3, 4], "3, 4"),
            (&[3, 4, 5], "3 to 5"),
            (
                &[1, 3, 4, 5, 9, u64::MAX],
                "1, 3 to 5, 9, 18446744073709551615",
            ),
        ] {
            assert_eq!(numbers(all), told);
        }
    }
}
