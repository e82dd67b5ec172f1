//! Volumes of the real stack under the NBD clients that people use. The scripts of tests/clients
//! say what they skip because it is not installed.
#![allow(clippy::unwrap_used)]

use std::process::Command;

fn run(script: &str, arguments: &[&str]) {
    let path = format!("{}/../tests/clients/{script}", env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(path).arg(env!("CARGO_BIN_EXE_endio")).args(arguments).output();
    let output = output.unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{out}");
    assert!(output.status.success(), "{out}\n{err}");
}

#[test]
fn the_clients_that_people_use_work_with_volumes() {
    run("endio.sh", &[]);
}

#[test]
fn a_file_system_survives_the_death_of_every_service() {
    run("filesystem.sh", &["2"]);
}

#[test]
fn file_systems_of_two_tebibytes_are_made_quickly_and_discarded() {
    run("mkfs.sh", &[]);
}

#[test]
fn over_tls_only_clients_with_a_certificate_get_in() {
    run("tls.sh", &[]);
}
