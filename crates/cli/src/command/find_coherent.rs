//! `tidemark find-coherent`: goes back through the images of a volume until a check passes.
//!
//! Each image is written to a file of its own, verified, and checked there; the check may write to it. So it can mount it,
//! replay a journal or start a database, and nothing that is kept is touched.

mod check;
mod search;

use std::path::{Path, PathBuf};

use serde::Serialize;
use tidemark_proto::{capture::v1::ListSnapshotsRequest, vault::v1::ListGenerationsRequest};

use super::{restore, snapshot};
use crate::{
    args::{FindCoherentArgs, Global},
    failure::{Failure, Kind},
    format, output,
    report::{self, Time},
};
use check::{PLACE, Verdict, check};
use search::Search;

/// An image that can be looked at.
#[derive(Debug, Clone, Serialize)]
struct Candidate {
    /// One of these two.
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
    cut_time: Time,
    coherence: &'static str,
}

/// An image that was looked at.
#[derive(Debug, Serialize)]
struct Checked {
    #[serde(flatten)]
    candidate: Candidate,
    passed: bool,
}

/// What a search came to.
#[derive(Debug, Serialize)]
struct Found {
    /// The volume, as it was asked for.
    volume: String,
    /// The newest that passed.
    found: Candidate,
    /// The images that were looked at, in that order.
    checked: Vec<Checked>,
    /// Where the image is, if it was to be kept.
    kept: Option<String>,
}

pub(super) async fn run(global: &Global, args: FindCoherentArgs) -> Result<(), Failure> {
    if !args.check.contains(PLACE) {
        return Err(Failure::new(
            Kind::Usage,
            "CHECK_INVALID",
            format!("the check does not say where the image goes: {PLACE} is missing"),
            format!("write for example --check 'e2fsck -fp {PLACE}'"),
        ));
    }
    let candidates = candidates(global, &args).await?;
    if candidates.is_empty() {
        return Err(none(format!(
            "{} has no snapshot and no generation",
            args.volume
        )));
    }
    let dir = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let mut search = Search::new(candidates.len(), args.bisect);
    let mut best = None;
    let mut checked = Vec::new();
    while let Some(at) = search.next() {
        let candidate = &candidates[at];
        let image = Image::fetch(global, &args.volume, candidate, &dir).await?;
        let name = candidate.name(&args.volume);
        let shown = !global.json;
        let verdict = check(&args.check, &image.0, &name, args.check_timeout, shown).await?;
        if shown {
            let cut = format::time(candidate.cut_time);
            eprintln!("{name}, cut {cut}: {}", told(verdict));
        }
        let passed = verdict == Verdict::Passed;
        checked.push(Checked {
            candidate: candidate.clone(),
            passed,
        });
        search.tell(passed);
        if passed {
            best = Some(at);
        }
    }
    let Some(at) = best else {
        return Err(none(format!(
            "none of the {} images of {} that were looked at passes the check",
            checked.len(),
            args.volume
        )));
    };
    if let Some(output) = &args.keep {
        // Once more: the check may have changed the one that it was given.
        let force = args.force;
        candidates[at]
            .fetch(global, &args.volume, output.clone(), force)
            .await?;
    }
    let found = Found {
        volume: args.volume,
        found: candidates[at].clone(),
        checked,
        kept: args.keep.map(|path| path.display().to_string()),
    };
    output::print(global.json, &found, &found.describe())
}

fn none(message: String) -> Failure {
    Failure::new(
        Kind::NotFound,
        "NONE_COHERENT",
        message,
        "look at what the check says of an image that `tidemark restore` wrote",
    )
}

const fn told(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Passed => "passes",
        Verdict::Failed => "fails",
        Verdict::TimedOut => "fails: the check took longer than --check-timeout",
    }
}

/// Everything there is of the volume, newest first. One of the two services may be out of reach.
async fn candidates(global: &Global, args: &FindCoherentArgs) -> Result<Vec<Candidate>, Failure> {
    let local = snapshots(global, &args.volume).await;
    let vaulted = generations(global, &args.volume).await;
    let mut all = match (local, vaulted) {
        (Ok(local), Ok(vaulted)) => [local, vaulted].concat(),
        (Ok(some), Err(failure)) | (Err(failure), Ok(some)) if !some.is_empty() => {
            if !global.json {
                eprintln!("left out: {failure}");
            }
            some
        }
        (Err(failure), _) | (_, Err(failure)) => return Err(failure),
    };
    all.sort_by_key(|candidate| std::cmp::Reverse(candidate.cut_time));
    Ok(all)
}

async fn snapshots(global: &Global, volume: &str) -> Result<Vec<Candidate>, Failure> {
    let request = ListSnapshotsRequest {
        volume: volume.to_owned(),
    };
    let listed = global.capture().await?.list_snapshots(request).await?;
    let listed = listed.into_inner().snapshots.into_iter();
    Ok(listed
        .map(report::Snapshot::new)
        .map(|snapshot| Candidate {
            snapshot: Some(snapshot.snapshot),
            generation: None,
            cut_time: snapshot.cut_time,
            coherence: snapshot.coherence,
        })
        .collect())
}

async fn generations(global: &Global, volume: &str) -> Result<Vec<Candidate>, Failure> {
    let request = ListGenerationsRequest {
        volume: volume.to_owned(),
    };
    let listed = global.vault().await?.list_generations(request).await?;
    listed
        .into_inner()
        .generations
        .iter()
        .map(|generation| {
            let generation = report::Generation::new(generation)?;
            Ok(Candidate {
                snapshot: None,
                generation: Some(generation.generation),
                cut_time: generation.cut_time,
                coherence: generation.coherence,
            })
        })
        .collect()
}

impl Candidate {
    fn name(&self, volume: &str) -> String {
        match (self.snapshot, self.generation) {
            (Some(snapshot), _) => format!("snapshot {snapshot} of {volume}"),
            (None, generation) => format!("{volume}@{}", generation.unwrap_or(0)),
        }
    }

    /// How it is brought back.
    fn command(&self, volume: &str) -> String {
        match (self.snapshot, self.generation) {
            (Some(snapshot), _) => format!("tidemark snapshot rollback {volume} {snapshot}"),
            (None, generation) => {
                format!("tidemark restore {volume}@{} FILE", generation.unwrap_or(0))
            }
        }
    }

    async fn fetch(
        &self,
        global: &Global,
        volume: &str,
        output: PathBuf,
        force: bool,
    ) -> Result<(), Failure> {
        let volume = volume.to_owned();
        match (self.snapshot, self.generation) {
            (Some(snapshot), _) => {
                let read = snapshot::Read {
                    volume,
                    snapshot,
                    output,
                    since: None,
                    force,
                };
                read.write(global).await?;
            }
            (None, generation) => {
                restore::write(global, volume, generation, output, force).await?;
            }
        }
        Ok(())
    }
}

/// An image in a file of its own, removed when it is dropped.
#[derive(Debug)]
struct Image(PathBuf);

impl Image {
    async fn fetch(
        global: &Global,
        volume: &str,
        candidate: &Candidate,
        dir: &Path,
    ) -> Result<Self, Failure> {
        let image = Self(dir.join(format!("tidemark-{}.img", uuid::Uuid::new_v4().simple())));
        candidate
            .fetch(global, volume, image.0.clone(), false)
            .await?;
        Ok(image)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // Nothing better can be done about a file that cannot be removed than to leave it.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Found {
    fn describe(&self) -> String {
        let mut fields = vec![
            ("found", self.found.name(&self.volume)),
            ("cut", format::time(self.found.cut_time)),
            ("coherence", self.found.coherence.to_owned()),
            ("checked", format!("{} images", self.checked.len())),
        ];
        if let Some(kept) = &self.kept {
            fields.push(("wrote", kept.clone()));
        }
        fields.push(("bring it back", self.found.command(&self.volume)));
        format::fields(&fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_is_printed_for_people_and_for_programs() {
        let found = |snapshot, generation| Found {
            volume: "data".into(),
            found: Candidate {
                snapshot,
                generation,
                cut_time: report::time(1_793_337_404_000),
                coherence: "crash",
            },
            checked: vec![Checked {
                candidate: Candidate {
                    snapshot: Some(4),
                    generation: None,
                    cut_time: report::time(1_793_337_409_000),
                    coherence: "crash",
                },
                passed: false,
            }],
            kept: None,
        };
        insta::assert_snapshot!(found(None, Some(7)).describe());
        insta::assert_snapshot!(found(Some(2), None).describe());
        insta::assert_json_snapshot!(found(None, Some(7)));
    }
}
