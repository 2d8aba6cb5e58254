#![allow(
    unreachable_pub,
    reason = "the macro makes public what a service shows"
)]

use std::os::unix::ffi::OsStringExt;

use super::*;

settings! {
    /// A name.
    name: String = "plain".to_owned();
    /// A number.
    number: u32 = 7;
    /// A size.
    size: ByteSize = ByteSize::mib(1);
    /// A limit of the size.
    size_max: ByteSize = ByteSize::mib(4);
    /// A time.
    time: Span = Span::from_secs(1);
}

impl Settings for Config {
    const PREFIX: &'static str = "SAMPLE_";

    const STANDARD: &'static [(&'static str, &'static str)] =
        &[("COMMON_NAME", "name"), ("COMMON_TIME", "time")];

    fn is_foreign(key: &str) -> bool {
        key == "port"
    }

    fn check(&self, rules: &mut Rules) {
        rules.within("number", self.number, 1..=9);
        rules.at_least("size_max", self.size_max, self.size);
        rules.that("time", !self.time.is_zero(), "must be above 0s");
    }
}

fn load(toml: &str, environment: &[(&str, &str)], flags: Flags) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sample.toml");
    std::fs::write(&path, toml).unwrap();
    let environment = environment
        .iter()
        .map(|(name, value)| (name.into(), value.into()));
    Config::load(Some(&path), environment, flags)
}

fn problems(toml: &str, environment: &[(&str, &str)]) -> Vec<String> {
    load(toml, environment, Flags::default())
        .unwrap_err()
        .problems
}

#[test]
fn each_layer_overrides_the_one_before_it() {
    let toml = "name = 'file'\nnumber = 1\nsize = 1\n";
    let flags = Flags {
        name: Some("flag".to_owned()),
        ..Flags::default()
    };
    let environment = [("SAMPLE_NAME", "env"), ("SAMPLE_NUMBER", "2")];
    let config = load(toml, &environment, flags).unwrap();
    let expected = Config {
        name: "flag".to_owned(),
        number: 2,
        size: ByteSize::new(1),
        ..Config::default()
    };
    assert_eq!(config, expected);
}

#[test]
fn what_is_printed_loads_again() {
    let config = Config {
        name: "[not] = toml".to_owned(),
        time: Span::from_millis(1500),
        ..Config::default()
    };
    let again = load(&config.to_toml(), &[], Flags::default());
    assert_eq!(again, Ok(config));
}

#[test]
fn text_that_looks_like_a_number_stays_text_where_text_is_wanted() {
    let environment = [("SAMPLE_NAME", "2026"), ("SAMPLE_NUMBER", "3")];
    let config = load("", &environment, Flags::default()).unwrap();
    assert_eq!((config.name.as_str(), config.number), ("2026", 3));
}

#[test]
fn variables_of_others_are_left_alone() {
    let environment = [
        ("SAMPLE_CONFIG", "a file"),
        ("SAMPLE_PORT", "tcp://10.0.0.1:1"),
        ("OTHER_NAME", "x"),
    ];
    assert_eq!(
        load("", &environment, Flags::default()),
        Ok(Config::default())
    );
}

#[test]
fn a_rule_names_what_it_holds_for_even_where_that_is_the_default() {
    assert_eq!(
        problems("size = '8MiB'\n", &[]),
        ["size_max = \"4MiB\" (the default): must be at least 8MiB"]
    );
}

#[test]
fn a_value_that_cannot_be_read_breaks_no_rule_besides() {
    let found = problems("size_max = 'much'\nsize = '1GiB'\n", &[]);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("size_max = \"much\" ("), "{found:?}");
}

#[test]
fn a_file_that_is_not_toml_hides_no_mistake_of_the_other_layers() {
    let found = problems("name = \n", &[("SAMPLE_NUMBER", "many")]);
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].contains("sample.toml"), "{found:?}");
    assert!(
        found[1].starts_with("number = \"many\" (SAMPLE_NUMBER): "),
        "{found:?}"
    );
}

#[test]
fn a_file_that_cannot_be_read_is_a_problem() {
    let path = Path::new("/nonexistent/sample.toml");
    let error = Config::load(Some(path), [], Flags::default()).unwrap_err();
    assert!(
        error.to_string().contains("/nonexistent/sample.toml"),
        "{error}"
    );
}

#[test]
fn a_variable_that_is_not_utf_8_is_a_problem() {
    let name = OsString::from("SAMPLE_NAME");
    let value = OsString::from_vec(vec![b'x', 0xff]);
    let error = Config::load(None, [(name, value)], Flags::default()).unwrap_err();
    assert_eq!(
        error.problems,
        ["name = \"x\\xFF\" (SAMPLE_NAME): isn't UTF-8"]
    );
}

#[test]
fn values_of_the_wrong_kind_are_told_what_would_do() {
    let found = problems("size = true\ntime = 15\nnumber = '3'\n", &[]);
    assert_eq!(found.len(), 3, "{found:?}");
    assert!(found[0].contains("number = \"3\"") && found[0].contains("expected u32"));
    assert!(found[1].contains("size = true") && found[1].contains("write 4096"));
    assert!(found[2].contains("time = 15") && found[2].contains("write 15s"));
}

#[test]
fn a_standard_variable_counts_where_nothing_of_our_own_says_otherwise() {
    let standard = [("COMMON_NAME", "common"), ("COMMON_TIME", "")];
    let named = |toml: &str, environment: &[(&str, &str)]| {
        let config = load(toml, environment, Flags::default()).unwrap();
        (config.name, config.time)
    };
    let second = Span::from_secs(1);
    assert_eq!(named("", &standard), ("common".to_owned(), second));
    assert_eq!(named("name = 'file'\n", &standard).0, "file");
    let both = [standard[0], ("SAMPLE_NAME", "own")];
    assert_eq!(named("", &both).0, "own");
}

#[test]
fn a_standard_variable_that_is_of_no_use_is_passed_over() {
    for useless in ["soon", "0s"] {
        let standard = [("COMMON_NAME", "common"), ("COMMON_TIME", useless)];
        let config = load("", &standard, Flags::default()).unwrap();
        let expected = ("common", Span::from_secs(1));
        assert_eq!((&*config.name, config.time), expected, "{useless}");
        // What else is wrong is told all the same, and once.
        let found = problems("number = 0\nother = 1\n", &standard);
        assert_eq!(found.len(), 2, "{found:?}");
        let found = problems("time = '0s'\n", &standard);
        assert_eq!(found.len(), 1, "{found:?}");
    }
}
