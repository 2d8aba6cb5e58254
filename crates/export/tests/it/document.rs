//! `docs/NBD.md` states numbers; they are the code's.

use std::collections::BTreeMap;

use tidemark_export::nbd::limits::{self, Limits};
use tidemark_export::nbd::negotiate::BLOCK_SIZE_MIN;

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/NBD.md");

#[test]
fn the_documents_table_of_limits_states_the_codes_numbers() {
    let text = std::fs::read_to_string(DOCUMENT).unwrap();
    assert!(text.contains(&format!("minimum {BLOCK_SIZE_MIN} (any byte range")));
    assert!(text.contains(&format!(
        "maximum {} MiB",
        limits::REQUEST_PAYLOAD_MAX >> 20
    )));
    // Rows: | `name` | number unit | what |
    let (_, text) = text.split_once("## Limits").unwrap();
    let stated: BTreeMap<&str, &str> = text
        .lines()
        .filter_map(|line| {
            let mut cells = line.split('|').map(str::trim).skip(1);
            let name = cells.next()?.strip_prefix('`')?.strip_suffix('`')?;
            Some((name, cells.next()?))
        })
        .collect();
    let defaults = Limits::default();
    let kib = |bytes: usize| format!("{} KiB", bytes >> 10);
    let seconds = |time: std::time::Duration| format!("{} s", time.as_secs());
    let expected: BTreeMap<&str, String> = [
        (
            "REQUEST_PAYLOAD_MAX",
            kib(limits::REQUEST_PAYLOAD_MAX as usize),
        ),
        ("OPTION_LENGTH_MAX", kib(limits::OPTION_LENGTH_MAX as usize)),
        ("OPTION_SKIP_MAX", kib(limits::OPTION_SKIP_MAX as usize)),
        ("OPTIONS_MAX", limits::OPTIONS_MAX.to_string()),
        (
            "EXPORT_NAME_MAX",
            tidemark_export::exports::EXPORT_NAME_MAX.to_string(),
        ),
        ("RECEIVE_BUFFER_BYTES", kib(limits::RECEIVE_BUFFER_BYTES)),
        ("THREAD_BUFFER_BYTES", kib(limits::THREAD_BUFFER_BYTES)),
        ("LARGE_BUFFER_BYTES", kib(limits::LARGE_BUFFER_BYTES)),
        ("LARGE_BUFFERS_KEPT", limits::LARGE_BUFFERS_KEPT.to_string()),
        ("STATUS_EXTENTS_MAX", limits::STATUS_EXTENTS_MAX.to_string()),
        ("HOLE_READ_MIN", kib(limits::HOLE_READ_MIN as usize)),
        ("connections_max", defaults.connections_max.to_string()),
        (
            "requests_in_flight_max",
            defaults.requests_in_flight_max.to_string(),
        ),
        ("large_buffers_max", defaults.large_buffers_max.to_string()),
        ("handshake_timeout", seconds(defaults.handshake_timeout)),
        ("receive_timeout", seconds(defaults.receive_timeout)),
        ("send_timeout", seconds(defaults.send_timeout)),
        ("KEEPALIVE_IDLE", seconds(limits::KEEPALIVE_IDLE)),
        ("KEEPALIVE_INTERVAL", seconds(limits::KEEPALIVE_INTERVAL)),
        ("KEEPALIVE_PROBES", limits::KEEPALIVE_PROBES.to_string()),
        ("spin_max", seconds(defaults.spin_max)),
        ("thread_idle_timeout", seconds(defaults.thread_idle_timeout)),
    ]
    .into();
    for (name, number) in &expected {
        assert_eq!(stated.get(name), Some(&number.as_str()), "{name}");
    }
    let unknown: Vec<_> = stated
        .keys()
        .filter(|name| !expected.contains_key(*name))
        .collect();
    assert!(unknown.is_empty(), "stated, but not tested: {unknown:?}");
}
