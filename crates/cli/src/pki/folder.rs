//! The folder of a CA. Nothing in it is ever overwritten, save for the file of identities, and for certificates that are
//! renewed.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use tidemark_disk::durable;
use tidemark_identity::{Identities, Identity};

use crate::failure::{Failure, Kind};

/// The file of identities.
pub const IDENTITIES: &str = "identities.toml";
const CA_CERTIFICATE: &str = "ca.crt";
const CA_KEY: &str = "ca.key";
const HEADER: &str =
    "# Who may do what. Written by `tidemark pki`; may be edited. Every service has a copy.\n\n";
/// Only its owner reads a key or a token.
const SECRET_MODE: u32 = 0o600;
const PUBLIC_MODE: u32 = 0o644;

/// A folder of a CA, or of what somebody has of it.
#[derive(Debug, Clone)]
pub struct Folder(PathBuf);

impl Folder {
    /// At this path.
    #[must_use]
    pub const fn at(path: PathBuf) -> Self {
        Self(path)
    }

    /// Makes the folder itself, where it isn't there.
    ///
    /// # Errors
    /// It can't be made.
    pub fn create(&self) -> Result<(), Failure> {
        durable::create_dir(&self.0)
            .map_err(|error| Failure::io(format_args!("create {}", self.0.display()), &error))
    }

    /// A file in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The CA's certificate.
    #[must_use]
    pub fn ca_certificate(&self) -> PathBuf {
        self.path(CA_CERTIFICATE)
    }

    /// The CA's key.
    #[must_use]
    pub fn ca_key(&self) -> PathBuf {
        self.path(CA_KEY)
    }

    /// Whether a file is there.
    #[must_use]
    pub fn has(&self, path: &Path) -> bool {
        path.symlink_metadata().is_ok()
    }

    /// Whether a file is there.
    ///
    /// # Errors
    /// `OUTPUT_EXISTS`: it is.
    pub fn need_absent(&self, path: &Path, action: &str) -> Result<(), Failure> {
        if !self.has(path) {
            return Ok(());
        }
        Err(Failure::new(
            Kind::Conflict,
            "OUTPUT_EXISTS",
            format!("{} exists", path.display()),
            action,
        ))
    }

    /// Writes what only its owner may read, to a file that isn't there.
    ///
    /// # Errors
    /// It is, or can't be written.
    pub fn write_secret(&self, path: &Path, text: &str) -> Result<(), Failure> {
        self.write_new(path, text, SECRET_MODE)
    }

    /// Writes what everybody may read, to a file that isn't there.
    ///
    /// # Errors
    /// It is, or can't be written.
    pub fn write_public(&self, path: &Path, text: &str) -> Result<(), Failure> {
        self.write_new(path, text, PUBLIC_MODE)
    }

    fn write_new(&self, path: &Path, text: &str, mode: u32) -> Result<(), Failure> {
        let write = || {
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(mode)
                .open(path)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            durable::sync_dir(&self.0)
        };
        write().map_err(|error| Failure::io(format_args!("write {}", path.display()), &error))
    }

    /// Writes a file in the place of the one that is there, whole or not at all.
    ///
    /// # Errors
    /// It can't be written.
    pub fn replace(&self, path: &Path, text: &str) -> Result<(), Failure> {
        durable::write_file(path, text.as_bytes())
            .map_err(|error| Failure::io(format_args!("write {}", path.display()), &error))
    }

    /// Copies a file of this folder to another one, in the place of what is there. Only its owner may read the copy.
    ///
    /// # Errors
    /// It can't be read or written.
    pub fn copy(&self, path: &Path, to: &Self) -> Result<(), Failure> {
        let text = self.read(path, "issue the certificate first")?;
        let name = path.file_name().unwrap_or_default();
        to.replace(&to.0.join(name), &text)
    }

    /// Reads a text.
    ///
    /// # Errors
    /// It isn't there, or can't be read.
    pub fn read(&self, path: &Path, action: &str) -> Result<String, Failure> {
        fs::read_to_string(path).map_err(|error| {
            if error.kind() == io::ErrorKind::NotFound {
                Failure::new(
                    Kind::NotFound,
                    "PKI_NOT_FOUND",
                    format!("{} isn't there", path.display()),
                    action,
                )
            } else {
                Failure::io(format_args!("read {}", path.display()), &error)
            }
        })
    }

    /// The identities as the file has them; nobody where there is no file.
    ///
    /// # Errors
    /// It can't be read, or isn't right.
    pub fn identities(&self) -> Result<Identities, Failure> {
        let path = self.path(IDENTITIES);
        if !path.exists() {
            return Ok(Identities::default());
        }
        let text = self.read(&path, "")?;
        Identities::parse(&text).map_err(|error| {
            Failure::new(
                Kind::Conflict,
                "IDENTITIES_INVALID",
                format!("{}: {error}", path.display()),
                "correct the file first",
            )
        })
    }

    /// Puts an identity into the file, in the place of the one of its name.
    ///
    /// # Errors
    /// It isn't right, or the file can't be written.
    pub fn put(&self, identity: Identity) -> Result<(), Failure> {
        let mut identities = self.identities()?;
        identities.put(identity).map_err(|error| {
            Failure::new(Kind::Usage, "IDENTITIES_INVALID", error.to_string(), "")
        })?;
        let text = format!("{HEADER}{}", identities.to_toml());
        self.replace(&self.path(IDENTITIES), &text)
    }
}
