#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt as _;

use super::*;

const DAY: Duration = Duration::from_secs(86_400);

fn request(subject: Subject) -> Request {
    Request { subject, sans: Vec::new(), valid_for: DAY, if_missing: false }
}

#[test]
fn private_keys_are_for_their_owner_only() {
    let dir = tempfile::tempdir().unwrap();
    assert!(init(dir.path(), DAY, false).unwrap());
    let out = dir.path().join("a");
    assert!(issue(dir.path(), &out, &request(Subject::Client("a".into()))).unwrap());
    for key in [dir.path().join(AUTHORITY_KEY), out.join(KEY)] {
        let mode = std::fs::metadata(&key).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", key.display());
    }
}

#[test]
fn an_authority_is_never_replaced() {
    let dir = tempfile::tempdir().unwrap();
    assert!(init(dir.path(), DAY, true).unwrap());
    let before = read(&dir.path().join(AUTHORITY_KEY)).unwrap();
    assert!(matches!(init(dir.path(), DAY, false), Err(PkiError::Exists { .. })));
    assert!(!init(dir.path(), DAY, true).unwrap());
    assert_eq!(read(&dir.path().join(AUTHORITY_KEY)).unwrap(), before);
}

#[test]
fn if_missing_keeps_the_files_of_this_authority_and_replaces_those_of_another() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two, out) = (dir.path().join("1"), dir.path().join("2"), dir.path().join("out"));
    init(&one, DAY, false).unwrap();
    init(&two, DAY, false).unwrap();
    let request = Request { if_missing: true, ..request(Subject::Admin("root".into())) };
    assert!(issue(&one, &out, &request).unwrap());
    assert!(!issue(&one, &out, &request).unwrap());
    assert!(issue(&two, &out, &request).unwrap());
    std::fs::remove_file(out.join(KEY)).unwrap();
    assert!(issue(&two, &out, &request).unwrap());
}

#[test]
fn if_missing_replaces_a_certificate_before_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    init(dir.path(), DAY, false).unwrap();
    // Of the day that is asked for, a third must be left.
    for (life, is_replaced) in [(DAY / 4, true), (DAY / 2, false)] {
        let out = dir.path().join("out");
        let first = Request { valid_for: life, ..request(Subject::Client("a".into())) };
        assert!(issue(dir.path(), &out, &first).unwrap());
        let again = Request { if_missing: true, valid_for: DAY, ..first };
        assert_eq!(issue(dir.path(), &out, &again).unwrap(), is_replaced, "{life:?}");
        assert!(!issue(dir.path(), &out, &again).unwrap(), "the new one lives long enough");
    }
}

#[test]
fn if_missing_replaces_what_is_for_another_subject_or_lacks_a_host() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    init(dir.path(), DAY, false).unwrap();
    let service = |name: &str| Subject::Service { kind: "writeback".into(), name: name.into() };
    let wanted = |subject, sans: &[&str]| Request {
        sans: sans.iter().map(|san| (*san).to_owned()).collect(),
        if_missing: true,
        ..request(subject)
    };
    let steps: [(Subject, &[&str]); 5] = [
        (service("a"), &[]),
        (service("b"), &[]),
        (service("b"), &["b.example"]),
        (service("b"), &["b.example", "10.0.0.7"]),
        (service("b"), &["b.example", "*.b.example", "10.0.0.7", "::1"]),
    ];
    for (subject, sans) in steps {
        let request = wanted(subject, sans);
        assert!(issue(dir.path(), &out, &request).unwrap(), "{request:?}");
        assert!(!issue(dir.path(), &out, &request).unwrap(), "{request:?}");
    }
    // One host fewer than it has is no reason.
    assert!(!issue(dir.path(), &out, &wanted(service("b"), &["::1"])).unwrap());
}

#[test]
fn if_missing_replaces_a_key_that_does_not_fit_its_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    init(dir.path(), DAY, false).unwrap();
    let request = Request { if_missing: true, ..request(Subject::Client("a".into())) };
    issue(dir.path(), &one, &request).unwrap();
    issue(dir.path(), &two, &request).unwrap();
    // As a stop between two of the files leaves them.
    std::fs::copy(one.join(KEY), two.join(KEY)).unwrap();
    assert!(issue(dir.path(), &two, &request).unwrap());
    std::fs::write(two.join(CERTIFICATE), "no certificate").unwrap();
    assert!(issue(dir.path(), &two, &request).unwrap());
}

#[test]
fn names_that_could_pretend_to_be_another_path_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    init(dir.path(), DAY, false).unwrap();
    for name in ["", "a/b", "a b", "é", "../x/y", &"n".repeat(65)] {
        let made = issue(dir.path(), &dir.path().join("x"), &request(Subject::Client(name.into())));
        assert!(matches!(made, Err(PkiError::Name { .. })), "{name:?}");
    }
    let sans = vec!["not a host".to_owned()];
    let bad = Request { sans, ..request(Subject::Client("a".into())) };
    assert!(matches!(issue(dir.path(), dir.path(), &bad), Err(PkiError::San { .. })));
}
