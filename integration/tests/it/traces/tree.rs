//! A trace as text: who is whose child, in the order in which they began. Ids and times are left out.

use std::fmt::Write;

use super::collector::Seen;

/// What is shown of a span, where it is said of it.
const SHOWN: [&str; 12] = [
    "trigger",
    "volume",
    "party",
    "attempt",
    "epoch",
    "coherence",
    "changed_blocks",
    "frames",
    "parts",
    "part",
    "generation",
    "error.type",
];

/// The tree below those of the spans that are nobody's child here.
pub(super) fn render(spans: &[Seen]) -> String {
    let mut text = String::new();
    let is_child = |span: &Seen| spans.iter().any(|other| other.id == span.parent);
    for root in in_order(spans, |span| !is_child(span)) {
        add(&mut text, spans, root, "", "");
    }
    text
}

fn in_order(spans: &[Seen], is_meant: impl Fn(&Seen) -> bool) -> Vec<&Seen> {
    let mut found: Vec<_> = spans.iter().filter(|span| is_meant(span)).collect();
    found.sort_by_key(|span| span.start_ns);
    found
}

fn add(text: &mut String, spans: &[Seen], span: &Seen, own: &str, below: &str) {
    let mut line = format!("{own}{} [{}]", span.name, span.service());
    for key in SHOWN {
        if let Some(value) = span.attributes.get(key) {
            write!(line, " {key}={value}").unwrap();
        }
    }
    writeln!(text, "{line}").unwrap();
    let children = in_order(spans, |other| other.parent == span.id);
    for (n, child) in children.iter().enumerate() {
        let (own, deeper) = if n + 1 < children.len() {
            ("├─ ", "│  ")
        } else {
            ("└─ ", "   ")
        };
        let (own, deeper) = (format!("{below}{own}"), format!("{below}{deeper}"));
        add(text, spans, child, &own, &deeper);
    }
}
