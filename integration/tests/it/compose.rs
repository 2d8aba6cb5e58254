//! The tour of docs/DOCKER.md, word for word.

use std::{fs, path::Path, process::Command};

use crate::{
    containers::{TAG, docker_does, have_images},
    docs::{root, shell_blocks},
};

/// `docker compose …`, as the tour has it, by whichever Compose there is. Images are there already.
const SHIM: &str = r#"#!/bin/bash
if [[ "$1" == compose ]]; then
    shift
    args=()
    for arg in "$@"; do [[ "$arg" == --build ]] || args+=("$arg"); done
    exec "$COMPOSE" --project-name "$PROJECT" "${args[@]}"
fi
exec /usr/bin/docker "$@"
"#;

#[test]
fn the_tour_with_compose_goes_as_it_is_written() {
    let compose = root().join("integration/.venv/bin/docker-compose");
    if !have_images() || !have_python_tool(&compose) {
        return;
    }
    let document = fs::read_to_string(root().join("docs/DOCKER.md")).unwrap();
    let tour = document.split("## A tour").nth(1).unwrap();
    let tour = tour.split("\n## ").next().unwrap();
    let blocks = shell_blocks(tour);
    assert!(blocks.len() > 4);

    let composed = fs::read_to_string(root().join("docker/compose.yaml")).unwrap();
    assert!(!composed.contains("ALLOW_PLAIN_TEXT") && !composed.contains("http://vault"));

    let dir = tempfile::tempdir().unwrap();
    let shim = dir.path().join("docker");
    fs::write(&shim, SHIM).unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&shim, executable).unwrap();
    let project = format!("tidemark-tour-{}", std::process::id());
    let path = format!(
        "{}:/usr/bin:{}",
        dir.path().display(),
        std::env::var("PATH").unwrap()
    );
    let mut command = Command::new("bash");
    command
        .args(["-euo", "pipefail", "-c"])
        .current_dir(root())
        .env("PATH", path)
        .env("COMPOSE", fs::canonicalize(compose).unwrap())
        .env("PROJECT", &project);
    for image in ["cli", "vault", "capture", "workload"] {
        let key = format!("TIDEMARK_{}_IMAGE", image.to_uppercase());
        command.env(key, format!("tidemark-{image}:{TAG}"));
    }
    let output = command.arg(blocks.concat()).output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    let label = format!("label=com.docker.compose.project={project}");
    let left = docker_does(&["ps", "--all", "--quiet", "--filter", &label]);
    if !left.is_empty() {
        let containers: Vec<_> = left.lines().collect();
        docker_does(&[&["rm", "--force", "--volumes"], &containers[..]].concat());
    }
    assert!(output.status.success(), "{told}\n{errors}");
    assert_eq!(left, "", "the tour leaves no container");
    let volumes = docker_does(&["volume", "ls", "--quiet", "--filter", &label]);
    assert_eq!(volumes, "", "the tour leaves no volume");
    for line in ["data@", "entry 0"] {
        assert!(told.contains(line), "{line}: {told}");
    }
}

/// Whether integration/setup.sh has installed this; a test without it is skipped, and fails in CI.
pub(crate) fn have_python_tool(path: &Path) -> bool {
    if path.exists() {
        return true;
    }
    let why = format!("{} is not there: run integration/setup.sh", path.display());
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{why}");
    println!("skipped: {why}");
    false
}
