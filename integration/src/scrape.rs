//! A scrape of a service's metrics, as a monitor makes it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

/// One line of an exposition.
#[derive(Debug)]
pub struct Sample {
    /// With `_bucket`, `_sum` or `_count`, where it is a histogram's.
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

/// What a service answered.
#[derive(Debug)]
pub struct Scrape {
    pub text: String,
    pub samples: Vec<Sample>,
}

/// Asks; panics where the answer is anything but an exposition.
pub fn scrape(addr: SocketAddr) -> Scrape {
    let answer = get(addr, "/metrics");
    let (head, text) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    let kind = "content-type: text/plain; version=0.0.4; charset=utf-8";
    assert!(head.contains(kind), "{head}");
    Scrape::parse(text)
}

/// The whole answer to a request.
pub fn get(addr: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {addr}\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

impl Scrape {
    fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let samples: Vec<_> = lines.map(Sample::parse).collect();
        let series: BTreeSet<_> = samples.iter().map(|s| (&s.name, &s.labels)).collect();
        assert_eq!(series.len(), samples.len(), "a series comes once: {text}");
        Self {
            text: text.to_owned(),
            samples,
        }
    }

    /// The samples of this name that have these labels, and perhaps others.
    pub fn of<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&str, &str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| {
            let has = |(label, value): &(&str, &str)| {
                sample.labels.get(*label).is_some_and(|has| has == value)
            };
            sample.name == name && labels.iter().all(has)
        })
    }

    /// The one sample of this name that has these labels.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let found: Vec<_> = self.of(name, labels).collect();
        assert_eq!(found.len(), 1, "{name}{labels:?} in {}", self.text);
        found[0].value
    }

    /// The sum of the samples of this name that have these labels.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.of(name, labels).map(|sample| sample.value).sum()
    }
}

impl Sample {
    /// Labels as our services have them: no comma, brace or escape in a value.
    fn parse(line: &str) -> Self {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = match series.split_once('{') {
            None => (series, ""),
            Some((name, labels)) => (name, labels.strip_suffix('}').unwrap()),
        };
        let labels = labels.split(',').filter(|label| !label.is_empty());
        let labels = labels.map(|label| {
            let (name, value) = label.split_once('=').unwrap();
            let value = value.strip_prefix('"').and_then(|v| v.strip_suffix('"'));
            (name.to_owned(), value.unwrap().to_owned())
        });
        Self {
            name: name.to_owned(),
            labels: labels.collect(),
            value: value.parse().unwrap_or_else(|_| panic!("{line}")),
        }
    }
}
