//! The recipes of the documentation, word for word, with a workload that writes without pause: every generation is
//! quiesced, and has what the recipe says it has.

use std::fs;

use serde_json::Value;

use super::{python::make_agent, world::World};
use crate::{
    docs::{root, shell_blocks},
    programs::have,
};

/// Writes to the mounted filesystem until it is killed.
const FILES: &str =
    "while :; do date >>/srv/db/log; sync /srv/db/log; date >/srv/db/unsynced; done & writer=$!";

/// Ships whenever something has changed; prints the receipts, and leaves the numbers of the generations in `numbers`.
const SHIP_FIVE: &str = r#"
numbers=""
for _ in 1 2 3 4 5; do
    while tidemark volume show db --json | grep -q '"changed_blocks":0,'; do sleep 0.05; done
    receipt=$(tidemark ship db --json)
    echo "$receipt"
    numbers="$numbers $(sed 's/.*"generation":\([0-9]*\).*/\1/' <<<"$receipt")"
done
"#;

/// A section of the recipes.
fn recipe(title: &str) -> String {
    let page = fs::read_to_string(root().join("docs/RECIPES.md")).unwrap();
    let section = page.split(&format!("## {title}\n")).nth(1).unwrap();
    section.split("\n## ").next().unwrap().to_owned()
}

/// A volume `db` mounted at `/srv/db`, as the recipes have it, with a configuration.
fn begin(configuration: &str) -> Option<World> {
    let mut world = World::new()?;
    fs::write(world.path("capture.toml"), configuration).unwrap();
    world.in_a_terminal(
        "vault",
        "vault-svc --store-dir $WORLD/store --state-dir $WORLD/vault --retain 20",
    );
    world.in_a_terminal(
        "capture",
        "capture-svc --config $WORLD/capture.toml --state $WORLD/capture --fuse-mount /mnt/tidemark --interval-max 1h",
    );
    world.then(
        "both_answer\n\
         tidemark volume add db --file /srv/db.img --size 256MiB >&2\n\
         mkfs.ext4 -q /mnt/tidemark/db.img\n\
         mkdir /srv/db /srv/restored\n\
         mount -o loop /mnt/tidemark/db.img /srv/db\n\
         tidemark ship db >&2",
    );
    Some(world)
}

/// The configuration that a recipe gives.
fn configuration(recipe: &str) -> &str {
    let rest = recipe.split("```toml\n").nth(1).unwrap();
    rest.split("```").next().unwrap()
}

/// Receipts among what was printed.
fn receipts(told: &str) -> Vec<Value> {
    told.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter(|value: &Value| value["generation"].is_u64())
        .collect()
}

/// All were shipped, with something in them, and quiesced.
fn assert_quiesced(told: &str, count: usize) {
    let receipts = receipts(told);
    assert_eq!(receipts.len(), count, "{told}");
    for receipt in receipts {
        assert_eq!(receipt["coherence"], "quiesced", "{receipt}");
        assert_eq!(receipt["created"], true, "the workload goes on: {receipt}");
    }
}

#[test]
fn the_recipe_for_filesystems_quiesces_and_no_journal_is_left_to_replay() {
    if !have(&["fsfreeze", "dumpe2fs", "e2fsck"]) {
        return;
    }
    let recipe = recipe("Any filesystem");
    let Some(mut world) = begin(configuration(&recipe)) else {
        return;
    };
    world.then(FILES);
    world.then(SHIP_FIVE);
    // Not frozen any more.
    world.then("kill \"$writer\"; wait \"$writer\" || true; touch /srv/db/still-writable");
    world.then(
        "for number in $numbers; do\n\
         tidemark restore \"db@$number\" /srv/restored.img --force >&2\n\
         if dumpe2fs -h /srv/restored.img 2>&1 | grep needs_recovery; then exit 1; fi\n\
         e2fsck -fn /srv/restored.img >&2\n\
         done",
    );
    // A snapshot that is taken at once is not quiesced, and has something to replay: what is looked for above can be there.
    world.then(
        "touch /srv/db/one-more; sync /srv/db/one-more\n\
         tidemark snapshot create --now db >&2\n\
         dumpe2fs -h /mnt/tidemark/.snapshots/db/1.img 2>&1 | grep needs_recovery",
    );
    assert_quiesced(&world.run(), 5);
}

#[test]
fn the_recipe_for_postgresql_quiesces_and_the_generation_has_what_was_committed() {
    if !have(&["fsfreeze"]) {
        return;
    }
    let recipe = recipe("PostgreSQL");
    let Some(mut world) = begin(configuration(&recipe)) else {
        return;
    };
    world.then(
        "export PATH=\"$PATH:$(ls -d /usr/lib/postgresql/*/bin | tail -n 1)\"\n\
         cd /srv\n\
         pg() { runuser -u postgres -- \"$@\"; }\n\
         install -d -o postgres -g postgres -m 700 /srv/db/data\n\
         pg initdb --pgdata /srv/db/data >&2\n\
         pg pg_ctl --pgdata /srv/db/data --log /srv/db/data/log --wait start >&2\n\
         pg pgbench --initialize --quiet >&2\n\
         pg pgbench --client=4 --no-vacuum --time=100000 >&2 & bench=$!",
    );
    world.then(SHIP_FIVE);
    world.then(
        "kill -0 \"$bench\"\n\
         pg pg_ctl --pgdata /srv/db/data --mode immediate --wait stop >&2\n\
         tidemark restore \"db@${numbers##* }\" /srv/restored.img >&2\n\
         mount -o loop /srv/restored.img /srv/restored\n\
         rm /srv/restored/data/postmaster.pid\n\
         pg pg_ctl --pgdata /srv/restored/data --log /srv/restored/data/log --wait start >&2\n\
         pg psql -XAtc 'select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history)'\n\
         pg psql -XAtc 'select count(*) > 0 from pgbench_history'\n\
         pg pg_ctl --pgdata /srv/restored/data --wait stop >&2\n\
         until umount /srv/restored; do sleep 0.1; done\n\
         until umount /srv/db; do sleep 0.1; done",
    );
    let told = world.run();
    assert_quiesced(&told, 5);
    assert!(told.ends_with("\nt\nt\n"), "{told}");
}

const BOOKKEEPING: &str = "pragma journal_mode = wal; create table account (balance integer); \
    insert into account values (100), (0); create table transfer (number integer primary key)";

/// Transfers from the first account to the second, each with a number.
const TRANSFERS: &str = r#"
number=0
while :; do
    number=$((number + 1))
    echo "begin immediate;
        update account set balance = balance - 1 where rowid = 1;
        update account set balance = balance + 1 where rowid = 2;
        insert into transfer values ($number); commit;"
done | sqlite3 -bail -cmd ".timeout 60000" /srv/db/app.db & writer=$!
"#;

#[test]
fn the_recipe_for_sqlite_quiesces_by_an_agent_in_python_which_thaws_and_hints_too() {
    if !have(&["sqlite3"]) {
        return;
    }
    let recipe = recipe("SQLite");
    let Some(mut world) = begin(configuration(&recipe)) else {
        return;
    };
    if make_agent(&world.path("home")).is_none() {
        return;
    }
    world.then(&format!("sqlite3 /srv/db/app.db '{BOOKKEEPING}' >&2"));
    world.then(TRANSFERS);
    let [agent] = shell_blocks(&recipe)[..] else {
        panic!("the recipe has one block");
    };
    world.in_a_terminal("agent", agent);
    world.then("until grep -q attached \"$WORLD/agent.out\"; do sleep 0.05; done");
    world.then(SHIP_FIVE);
    world.then("kill \"$agent_pid\" \"$writer\"; wait \"$agent_pid\" \"$writer\" || true");
    // The database without its log, from a filesystem whose journal is not replayed.
    world.then(
        "for number in $numbers; do\n\
         tidemark restore \"db@$number\" /srv/restored.img --force >&2\n\
         mount -o loop,ro,noload /srv/restored.img /srv/restored\n\
         cp /srv/restored/app.db /srv/alone.db\n\
         umount /srv/restored\n\
         sqlite3 /srv/alone.db 'pragma integrity_check; select sum(balance) from account;\n\
         select balance = (select count(*) from transfer) and balance > 0 from account where rowid = 2;'\n\
         done",
    );
    world.then("sqlite3 /srv/db/app.db 'insert into transfer values (-1)'");
    world.in_a_terminal("hinting", &format!("{} --hint", agent.trim_end()));
    world.then(
        "until grep -q hinted \"$WORLD/hinting.out\"; do sleep 0.05; done\n\
         cat \"$WORLD/hinting.out\"\n\
         sqlite3 /srv/db/app.db 'insert into transfer values (-2)'\n\
         until tidemark generation list db --json | grep '\"trigger\":\"hint\"'; do sleep 0.05; done",
    );
    let told = world.run();
    assert_quiesced(&told, 5);
    assert_eq!(told.matches("ok\n100\n1\n").count(), 5, "{told}");
    assert!(told.contains("hinted True COHERENCE_QUIESCED"), "{told}");
}
