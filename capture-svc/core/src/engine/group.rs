//! One instant for the cuts of several volumes.
//!
//! A workload that writes to one volume what it has read an answer for from another (a log and its data) is found whole
//! only if all are cut at one instant. Flips one after the other are not that: a write may enter one volume behind its
//! flip, end, and be followed by one that enters another before its own. So first the gate of each volume is closed, then
//! all are flipped, then the gates open: whoever is let in behind the first flip is let in behind all of them. Requests
//! that are under way belong to the cut, as ever.
//!
//! Nothing between closing and opening waits for anybody or anything but the processor, so that writers are held for
//! microseconds, at any size and number of volumes.

use super::{
    capture::{Capture, CaptureError},
    cut::{Cut, Purpose},
    media::Media,
};

/// Gates that are closed; dropping it opens them, whatever happens.
struct Closed<'c, M: Media>(Vec<&'c Capture<M>>);

impl<'c, M: Media> Closed<'c, M> {
    fn close(captures: Vec<&'c Capture<M>>) -> Self {
        let closed = Self(captures);
        for capture in &closed.0 {
            capture.close_gate(true);
        }
        closed
    }
}

impl<M: Media> Drop for Closed<'_, M> {
    fn drop(&mut self) {
        for capture in &self.0 {
            capture.close_gate(false);
        }
    }
}

/// Flips all of them at one instant, or none. The rest of each cut is as after [`Capture::begin_cut`]; the cuts are in
/// the order of the captures. The caller gives each capture once, and always in the same order, so that two calls never
/// wait for each other.
///
/// # Errors
/// As [`Capture::begin_cut`], with the position of the capture that refused.
pub fn begin_cuts<M: Media>(
    parts: Vec<(&Capture<M>, Purpose)>,
) -> Result<Vec<Cut>, (usize, CaptureError)> {
    let mut tables = Vec::with_capacity(parts.len());
    for (index, (capture, purpose)) in parts.iter().enumerate() {
        let ready = capture.table_to_change().and_then(|mut table| {
            capture.ready_to_cut(&mut table, purpose)?;
            Ok(table)
        });
        tables.push(ready.map_err(|error| (index, error))?);
    }
    let captures: Vec<_> = parts.iter().map(|(capture, _)| *capture).collect();
    let cuts = parts
        .into_iter()
        .zip(&mut tables)
        .map(|((capture, purpose), table)| capture.announce_cut(table, purpose))
        .collect();
    let closed = Closed::close(captures);
    for capture in &closed.0 {
        capture.flip();
    }
    Ok(cuts)
}
