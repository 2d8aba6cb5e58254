//! `tidemark pki`.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rcgen::KeyPair;
use serde::Serialize;
use tidemark_identity::{
    Identity, Pattern, Role, Roles,
    token::{TokenHash, hex},
};

use crate::{
    args::{Global, PkiCommand, PkiGrant, PkiIssueArgs, PkiTokenArgs},
    failure::{Failure, Kind},
    output,
    pki::{Authority, Folder, IDENTITIES, Subject},
    report::Moment,
};

const INIT_FIRST: &str = "make the CA first: tidemark pki init DIR";
/// Bytes of a token, before they are written in hexadecimal.
const TOKEN_BYTES: usize = 32;

#[derive(Debug, Serialize)]
struct PkiCa {
    certificate: String,
    key: String,
    /// Null where the CA was there already.
    valid_until: Option<Moment>,
}

#[derive(Debug, Serialize)]
struct PkiIdentity {
    name: String,
    roles: Vec<Role>,
    volumes: Vec<Pattern>,
    hosts: Vec<String>,
    certificate: Option<String>,
    key: Option<String>,
    token_file: Option<String>,
    /// Null for a token, and where the certificate was there already.
    valid_until: Option<Moment>,
    /// Empty where it has no roles, and isn't in the file.
    identities: String,
    copied_to: Option<String>,
}

pub(super) fn run(global: &Global, command: PkiCommand) -> Result<(), Failure> {
    match command {
        PkiCommand::Init { dir, if_missing } => init(global, &Folder::at(dir), if_missing),
        PkiCommand::Issue(args) => issue(global, args),
        PkiCommand::Token(args) => token(global, args),
    }
}

fn init(global: &Global, folder: &Folder, if_missing: bool) -> Result<(), Failure> {
    folder.create()?;
    let (certificate, key) = (folder.ca_certificate(), folder.ca_key());
    let mut made = PkiCa {
        certificate: shown(&certificate),
        key: shown(&key),
        valid_until: None,
    };
    if if_missing && folder.has(&certificate) && folder.has(&key) {
        return output::print(global.json, &made, "the CA is there already\n");
    }
    let authority = if if_missing && folder.has(&key) {
        // Somebody was interrupted here before.
        Authority::of_key(&folder.read(&key, INIT_FIRST)?)?
    } else {
        for path in [&certificate, &key] {
            folder.need_absent(
                path,
                "there is a CA in this folder already: use it, or name another folder",
            )?;
        }
        let authority = Authority::new()?;
        folder.write_secret(&key, &authority.key())?;
        authority
    };
    let issued = authority.certificate(Timestamp::now())?;
    folder.write_public(&certificate, &issued.certificate)?;
    made.valid_until = Some(Moment(issued.valid_until));
    let text = format!(
        "the CA is made\n\
         \x20 {}   everybody gets a copy\n\
         \x20 {}   stays here, and nowhere else: whoever has it can be anybody\n",
        made.certificate, made.key
    );
    output::print(global.json, &made, &text)
}

fn issue(global: &Global, args: PkiIssueArgs) -> Result<(), Failure> {
    let folder = Folder::at(args.grant.dir.clone());
    let name = args.grant.name.clone();
    if args.grant.role.is_empty() && args.host.is_empty() {
        return Err(Failure::new(
            Kind::Usage,
            "ROLE_MISSING",
            format!("{name} would be nobody: it has no role, and is no service"),
            "give it a role with --role, or say with --host where it listens",
        ));
    }
    if name == "ca" {
        return Err(name_invalid(&name, "its certificate is the CA's own"));
    }
    let authority = Authority::of_key(&folder.read(&folder.ca_key(), INIT_FIRST)?)?;
    let certificate = folder.path(&format!("{name}.crt"));
    let key = folder.path(&format!("{name}.key"));
    let subject = Subject {
        name: name.clone(),
        hosts: args.host.clone(),
        valid: args.valid,
    };
    let identity = identity(&args.grant, None)?;
    // What can't be written there is found out before there is a certificate.
    folder.identities()?;
    let valid_until = if args.if_missing && folder.has(&certificate) {
        folder.read(&key, "remove the certificate, too, and both are made anew")?;
        None
    } else {
        let pair = pair(&folder, &certificate, &key, &args)?;
        let issued = authority.issue(&subject, &pair, Timestamp::now())?;
        if args.renew {
            folder.replace(&certificate, &issued.certificate)?;
        } else {
            if !folder.has(&key) {
                folder.write_secret(&key, &pair.serialize_pem())?;
            }
            folder.write_public(&certificate, &issued.certificate)?;
        }
        Some(Moment(issued.valid_until))
    };
    let identities = put(&folder, identity)?;
    if let Some(dir) = &args.copy_to {
        let mut paths = vec![folder.ca_certificate(), certificate.clone(), key.clone()];
        let known = folder.path(IDENTITIES);
        if !args.host.is_empty() && folder.has(&known) {
            paths.push(known);
        }
        copy(&folder, &paths, &Folder::at(dir.clone()))?;
    }
    let made = PkiIdentity {
        name,
        roles: args.grant.role,
        volumes: args.grant.volume,
        hosts: args.host,
        certificate: Some(shown(&certificate)),
        key: Some(shown(&key)),
        token_file: None,
        valid_until,
        identities,
        copied_to: args.copy_to.as_deref().map(shown),
    };
    output::print(global.json, &made, &described(&folder, &made))
}

fn copy(folder: &Folder, paths: &[PathBuf], to: &Folder) -> Result<(), Failure> {
    to.create()?;
    paths.iter().try_for_each(|path| folder.copy(path, to))
}

/// The key that a certificate is made for: a new one, or the one that is there.
fn pair(
    folder: &Folder,
    certificate: &Path,
    key: &Path,
    args: &PkiIssueArgs,
) -> Result<KeyPair, Failure> {
    if args.renew || (args.if_missing && folder.has(key)) {
        let text = folder.read(key, "there is nothing to renew: leave out --renew")?;
        return KeyPair::from_pem(&text).map_err(|error| no_key(key, &error));
    }
    for path in [certificate, key] {
        folder.need_absent(path, "for a new certificate of the same key give --renew")?;
    }
    KeyPair::generate().map_err(|error| no_key(key, &error))
}

fn token(global: &Global, args: PkiTokenArgs) -> Result<(), Failure> {
    let folder = Folder::at(args.grant.dir.clone());
    let name = args.grant.name.clone();
    let path = folder.path(&format!("{name}.token"));
    if name.contains('/') {
        return Err(name_invalid(
            &name,
            "its token is written to a file of this name",
        ));
    }
    folder.create()?;
    folder.identities()?;
    folder.need_absent(
        &path,
        "remove the file first, and its token is of no use any more once a new one is made",
    )?;
    let mut bytes = [0; TOKEN_BYTES];
    tidemark_tls::random(&mut bytes).map_err(|error| {
        Failure::new(
            Kind::Failed,
            "IO_FAILED",
            format!("cannot make a token: {error}"),
            "",
        )
    })?;
    let token = hex(&bytes);
    let identity = identity(&args.grant, Some(TokenHash::of(&token)))?;
    if identity.is_none() {
        return Err(Failure::new(
            Kind::Usage,
            "ROLE_MISSING",
            format!("{name} would be nobody: it has no role"),
            "give it a role with --role",
        ));
    }
    folder.write_secret(&path, &format!("{token}\n"))?;
    let identities = put(&folder, identity)?;
    let made = PkiIdentity {
        name,
        roles: args.grant.role,
        volumes: args.grant.volume,
        hosts: Vec::new(),
        certificate: None,
        key: None,
        token_file: Some(shown(&path)),
        valid_until: None,
        identities,
        copied_to: None,
    };
    output::print(global.json, &made, &described(&folder, &made))
}

fn identity(grant: &PkiGrant, token: Option<TokenHash>) -> Result<Option<Identity>, Failure> {
    if grant.role.is_empty() {
        return Ok(None);
    }
    if grant.volume.is_empty() {
        return Err(Failure::new(
            Kind::Usage,
            "VOLUMES_MISSING",
            format!("{} has no volumes for its roles to hold for", grant.name),
            "name some with --volume; '*' stands for all, of a source for all of its own",
        ));
    }
    let mut identity = Identity::new(grant.name.clone(), &grant.role, grant.volume.clone());
    identity.token_sha256 = token;
    Ok(Some(identity))
}

/// The file of identities, with this one in it. A certificate beside a token leaves the token as it is.
fn put(folder: &Folder, identity: Option<Identity>) -> Result<String, Failure> {
    let Some(mut identity) = identity else {
        return Ok(String::new());
    };
    if identity.token_sha256.is_none() {
        let known = folder.identities()?;
        let before = known.named(&identity.name);
        identity.token_sha256 = before.and_then(|before| before.token_sha256);
    }
    folder.put(identity)?;
    Ok(shown(&folder.path(IDENTITIES)))
}

fn name_invalid(name: &str, why: &str) -> Failure {
    let message = format!("nobody can be called {name:?}: {why}");
    Failure::new(Kind::Usage, "NAME_INVALID", message, "choose another name")
}

fn no_key(path: &Path, error: &rcgen::Error) -> Failure {
    Failure::new(
        Kind::Failed,
        "CERTIFICATE_FAILED",
        format!("{}: {error}", path.display()),
        "",
    )
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// What was made, and what to copy where.
fn described(folder: &Folder, made: &PkiIdentity) -> String {
    let mut text = format!("{}: roles {}", made.name, Roles::of(&made.roles));
    if let Some(valid_until) = &made.valid_until {
        text += &format!(", valid until {}", valid_until.0.strftime("%F"));
    } else if made.certificate.is_some() {
        text += ", the certificate is there already";
    }
    if let Some(dir) = &made.copied_to {
        text += &format!("\nwhat {} needs is copied to {dir}\n", made.name);
    } else {
        text += &format!(
            "\ncopy to where {} runs:\n  {}\n",
            made.name,
            shown(&folder.ca_certificate())
        );
        for path in [&made.certificate, &made.key, &made.token_file]
            .into_iter()
            .flatten()
        {
            text += &format!("  {path}\n");
        }
    }
    if !made.identities.is_empty() {
        text += &format!(
            "copy to every service that {} calls (it is read again by itself):\n  {}\n",
            made.name, made.identities
        );
    }
    text
}
