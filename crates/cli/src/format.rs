//! How values look to people: sizes, times, tables.

use std::fmt::Write;

use jiff::{RoundMode, Timestamp, TimestampRound, Unit};

use crate::report::{Moment, Time};

/// Bytes with a unit of 1024 and one decimal: `1.5 GiB`; below 1 KiB plain.
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    // Tenths, in whole numbers: a float would round 1023.96 KiB to 1024.0 KiB.
    let mut unit = 0;
    let mut divisor = 1024_u64;
    while unit + 1 < UNITS.len() && tenths(count, divisor) >= 10_240 {
        unit += 1;
        divisor <<= 10;
    }
    let tenths = tenths(count, divisor);
    if tenths.is_multiple_of(10) {
        format!("{} {}", tenths / 10, UNITS[unit])
    } else {
        format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
    }
}

fn tenths(count: u64, divisor: u64) -> u128 {
    (u128::from(count) * 10 + u128::from(divisor) / 2) / u128::from(divisor)
}

/// UTC to the second; `-` where there is none.
#[must_use]
pub fn time(time: Time) -> String {
    let seconds = TimestampRound::new()
        .smallest(Unit::Second)
        .mode(RoundMode::Floor);
    time.map_or_else(
        || "-".to_owned(),
        |Moment(t)| t.round(seconds).unwrap_or(t).to_string().replace('T', " "),
    )
}

/// How long ago `time` was: `12 s ago`; `never` where there is none.
#[must_use]
pub fn ago(time: Time, now: Timestamp) -> String {
    let Some(Moment(time)) = time else {
        return "never".to_owned();
    };
    let seconds = now.as_second().saturating_sub(time.as_second()).max(0);
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7_200 => format!("{} min ago", seconds / 60),
        7_200..172_800 => format!("{} h ago", seconds / 3_600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

/// Columns under their headings, as wide as they need; a column is right-aligned where every cell begins with a digit.
#[must_use]
pub fn table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .chain([headings[column].len()])
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let right: [bool; N] = std::array::from_fn(|column| {
        !rows.is_empty()
            && rows.iter().all(|row| {
                row[column].starts_with(|c: char| c.is_ascii_digit()) && !row[column].contains('-')
            })
    });
    let mut text = String::new();
    let mut line = |cells: [&str; N]| {
        let mut line = String::new();
        for (column, cell) in cells.iter().enumerate() {
            let width = widths[column];
            // Writing to a string cannot fail.
            let _ = if right[column] {
                write!(line, "{cell:>width$}  ")
            } else {
                write!(line, "{cell:<width$}  ")
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    };
    line(headings);
    for row in rows {
        line(std::array::from_fn(|column| row[column].as_str()));
    }
    text
}

/// `name: value` lines, the values under each other.
#[must_use]
pub fn fields(fields: &[(&str, String)]) -> String {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    fields
        .iter()
        .fold(String::new(), |mut text, (name, value)| {
            let line = format!("{:<width$}  {value}", format!("{name}:"));
            text.push_str(line.trim_end());
            text.push('\n');
            text
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_the_unit_that_reads_best() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (1_048_535, "1 MiB"),
            (1 << 20, "1 MiB"),
            (8 << 30, "8 GiB"),
            ((8 << 30) + (1 << 29), "8.5 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes(count), text, "{count}");
        }
    }

    #[test]
    fn times_are_utc_to_the_second() {
        assert_eq!(
            time(crate::report::time(1_793_337_404_999)),
            "2026-10-30 05:16:44Z"
        );
        assert_eq!(time(None), "-");
    }

    #[test]
    fn ages_have_the_unit_that_reads_best() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        let at = |second| Some(Moment(Timestamp::from_second(second).unwrap()));
        assert_eq!(ago(None, now), "never");
        assert_eq!(ago(at(1_000_003), now), "0 s ago");
        assert_eq!(ago(at(999_900), now), "100 s ago");
        assert_eq!(ago(at(999_400), now), "10 min ago");
        assert_eq!(ago(at(990_000), now), "2 h ago");
        assert_eq!(ago(at(0), now), "11 d ago");
    }

    #[test]
    fn tables_align_numbers_right_and_words_left() {
        let rows = [
            ["data".to_owned(), "9".to_owned(), "a".to_owned()],
            ["x".to_owned(), "10".to_owned(), String::new()],
        ];
        insta::assert_snapshot!(table(["VOLUME", "N", "NOTE"], &rows), @r"
        VOLUME   N  NOTE
        data     9  a
        x       10
        ");
        assert_eq!(table(["A", "B"], &[]), "A  B\n");
    }

    #[test]
    fn fields_put_their_values_under_each_other() {
        insta::assert_snapshot!(
            fields(&[("volume", "data".into()), ("size", "8 GiB".into()), ("problem", String::new())]),
            @r"
        volume:   data
        size:     8 GiB
        problem:
        "
        );
    }
}
