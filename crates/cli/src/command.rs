//! The subcommands, one module per family.

mod completions;
mod find_coherent;
mod generation;
mod health;
mod maintain;
mod man;
mod mount;
mod pki;
mod restore;
mod rollback;
mod scrub;
mod ship;
mod snapshot;
mod status;
mod up;
mod volume;

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    args::{Cli, Command},
    failure::Failure,
};

/// Does what the command line says. SIGINT and SIGTERM end it in order: temporary files are removed.
///
/// # Errors
/// Whatever the command could not do.
pub async fn run(cli: Cli) -> Result<(), Failure> {
    let listen = |kind| signal(kind).map_err(|e| Failure::io("listen for signals", &e));
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let stop = async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    let Cli { global, command } = cli;
    // `up` closes its services when it is told to stop; every other command is simply dropped.
    if let Command::Up(args) = command {
        return up::run(&global, args, stop).await;
    }
    let work = async {
        match command {
            Command::Up(_) => Ok(()),
            Command::Volume(command) => volume::run(&global, command).await,
            Command::Snapshot(command) => snapshot::run(&global, command).await,
            Command::Ship(args) => ship::run(&global, args).await,
            Command::Scrub(args) => scrub::run(&global, args).await,
            Command::Generation(command) => generation::run(&global, command).await,
            Command::Restore(args) => restore::run(&global, args).await,
            Command::FindCoherent(args) => find_coherent::run(&global, args).await,
            Command::Mount(args) => mount::run(&global, args).await,
            Command::Umount(args) => mount::unmount(&global, args).await,
            Command::Status(args) => status::run(&global, args).await,
            Command::Health(args) => health::run(&global, args).await,
            Command::Maintain(args) => maintain::run(&global, args).await,
            Command::Pki(command) => pki::run(&global, command),
            Command::Completions(args) => completions::run(&args),
            Command::Man(args) => man::run(global.json, &args),
        }
    };
    tokio::select! {
        done = work => done,
        () = stop => Err(Failure::interrupted()),
    }
}
