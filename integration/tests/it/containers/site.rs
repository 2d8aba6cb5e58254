//! The certificates of a fleet, made by the command's image in a folder of this machine.

use std::{
    fs,
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use rcgen::KeyPair;
use tidemark_cli::pki::{Authority, Subject, VALID_DEFAULT};

use super::fleet::{TAG, docker_does};

/// The fleet's own CA.
const OWN: &str = "pki";
/// One that nobody trusts.
const OTHER: &str = "other";

pub(crate) struct Site {
    dir: PathBuf,
    /// The name under which sources reach the vault.
    vault: String,
    sources: Vec<String>,
}

impl Site {
    /// A CA, and certificates of the vault, of sources, and of `me` who operates them. The folder is the images' user's.
    pub(super) fn new(dir: PathBuf, vault: String, sources: &[&str]) -> Self {
        let sources = sources.iter().map(|&source| source.to_owned()).collect();
        let site = Self {
            dir,
            vault,
            sources,
        };
        site.make(OWN);
        site
    }

    fn make(&self, ca: &str) {
        self.pki(&["init", ca]);
        for source in &self.sources {
            self.issue(ca, source, &["--role=source", "--volume=*"]);
        }
        if ca == OWN {
            let me = ["--role=restorer", "--role=viewer", "--volume=*"];
            self.issue(ca, "me", &me);
        }
        // After the others: it gets a copy of who they are.
        self.issue(ca, "vault", &["--host", &self.vault]);
    }

    fn issue(&self, ca: &str, name: &str, more: &[&str]) {
        let copy = format!("--copy-to=of-{ca}/{name}");
        self.pki(&[&["issue", name, "--dir", ca, &copy][..], more].concat());
    }

    fn pki(&self, args: &[&str]) {
        let at = "/var/lib/tidemark";
        let volume = format!("{}:{at}", self.dir.display());
        let image = format!("tidemark-cli:{TAG}");
        let run = ["run", "--rm", "--read-only", "--network=none"];
        let run = [
            &run[..],
            &["--volume", &volume, "--workdir", at, &image, "pki"],
        ]
        .concat();
        docker_does(&[&run[..], args].concat());
    }

    /// What `name` has of the fleet's CA: what is mounted.
    pub(crate) fn of(&self, name: &str) -> PathBuf {
        self.dir.join(format!("of-{OWN}")).join(name)
    }

    /// Whoever has a certificate of the fleet's CA gets it back.
    pub(crate) fn put_right(&self, name: &str) {
        self.put(name, &self.dir.join(OWN));
    }

    /// `name` gets a certificate of a CA that nobody trusts.
    pub(crate) fn put_of_another_ca(&self, name: &str) {
        let other = self.dir.join(OTHER);
        if !other.exists() {
            self.make(OTHER);
        }
        self.put(name, &other);
    }

    fn put(&self, name: &str, ca: &Path) {
        for file in [format!("{name}.key"), format!("{name}.crt")] {
            let content = fs::read(ca.join(&file)).unwrap();
            // In place: it stays the images' user's.
            fs::write(self.of(name).join(file), content).unwrap();
        }
    }

    /// `name` gets a certificate for its own key that has expired.
    pub(crate) fn put_expired(&self, name: &str, hosts: &[&str]) {
        self.put_made(name, hosts, "2020-01-01T00:00:00Z".parse().unwrap());
    }

    /// The vault gets a certificate that is for another name.
    pub(crate) fn put_of_another_name(&self) {
        self.put_made("vault", &["elsewhere"], Timestamp::now());
    }

    fn put_made(&self, name: &str, hosts: &[&str], made: Timestamp) {
        let own = |file: &str| fs::read_to_string(self.dir.join(OWN).join(file)).unwrap();
        let authority = Authority::of_key(&own("ca.key")).unwrap();
        let pem = own(&format!("{name}.key"));
        let subject = Subject {
            name: name.to_owned(),
            hosts: hosts.iter().map(|host| (*host).to_owned()).collect(),
            valid: VALID_DEFAULT,
        };
        let key = KeyPair::from_pem(&pem).unwrap();
        let issued = authority.issue(&subject, &key, made).unwrap();
        let at = self.of(name);
        fs::write(at.join(format!("{name}.key")), pem).unwrap();
        fs::write(at.join(format!("{name}.crt")), issued.certificate).unwrap();
    }
}
