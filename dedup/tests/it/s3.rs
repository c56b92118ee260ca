//! A real S3 service, and what goes wrong on the way to it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use tidemark_dedup::testing::{FaultProxy, Misbehaviour};
use tidemark_dedup::{RepoError, Repository, Result, Store, StoreCredentials, open_store, scrub};
use tidemark_lab::{ACCESS_KEY, BUCKET, S3Service, SECRET_KEY};

use crate::support::*;

/// All cases share one service: starting it costs more than they do.
#[test]
fn i4_on_s3_every_trouble_is_an_error_or_a_retry_and_the_next_run_succeeds() {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let service = S3Service::start(&tidemark_lab::weed(checkout), dir.path()).unwrap();
    type Case = (&'static str, fn(&S3Service));
    let cases: [Case; 9] = [
        ("works", a_repository_on_s3_works_like_any_other),
        ("conditional", a_create_is_conditional_and_knows_its_own_earlier_success),
        ("denied", a_wrong_key_is_access_denied_at_once),
        ("bucket", a_missing_bucket_is_named_at_once),
        ("silence", no_route_and_silence_are_unreachable_after_retries_and_name_the_endpoint),
        ("503", unavailable_is_tried_again_with_pauses_and_in_the_end_given_up),
        ("cut", an_upload_cut_in_the_middle_is_repeated_or_leaves_no_restore_point),
        ("lost", a_lost_answer_to_any_request_does_no_harm),
        ("full", a_full_store_is_named_at_once),
    ];
    let failed: Vec<&str> = std::thread::scope(|scope| {
        let service = &service;
        let runs: Vec<_> =
            cases.iter().map(|(name, case)| (name, scope.spawn(move || case(service)))).collect();
        runs.into_iter().filter_map(|(name, run)| run.join().is_err().then_some(*name)).collect()
    });
    assert_eq!(failed, [""; 0]);
}

fn credentials() -> StoreCredentials {
    StoreCredentials {
        access_key_id: Some(ACCESS_KEY.into()),
        secret_access_key: Some(SECRET_KEY.into()),
        session_token: None,
    }
}

/// A repository on the service, its store behind a proxy that may misbehave.
struct Place {
    proxy: FaultProxy,
    direct: Arc<dyn Store>,
    url: String,
}

impl Place {
    fn new(service: &S3Service, prefix: &str) -> Self {
        let proxy = FaultProxy::start(&format!("127.0.0.1:{}", service.port()));
        let direct = open_store(&service.url(prefix), &credentials()).unwrap();
        create(direct.clone());
        let url = format!(
            "s3://{BUCKET}/{prefix}?endpoint=http://{}&retry_seconds=8&timeout_seconds=3",
            proxy.address()
        );
        Self { proxy, direct, url }
    }

    fn open(&self) -> Repository {
        open(open_store(&self.url, &credentials()).unwrap()).unwrap()
    }

    /// What another host sees, without the proxy.
    fn points(&self) -> usize {
        let points = open(self.direct.clone()).unwrap().points(None).unwrap();
        points.into_iter().map(Result::unwrap).count()
    }

    /// The next run succeeds and reads back.
    fn assert_next_run(&self, n: u32) {
        self.proxy.misbehave(Misbehaviour::None);
        let before = self.points();
        let data = noise(u64::from(n), 30 * C);
        let point = put_point(&self.open(), n, &data).unwrap();
        assert_eq!(self.points(), before + 1);
        let other = open(self.direct.clone()).unwrap();
        let found = other.point(point.point).unwrap();
        assert!(read_disk(&other, &found.disks[0].root).unwrap() == data);
    }
}

fn a_repository_on_s3_works_like_any_other(service: &S3Service) {
    let url = service.url("works/a/prefix");
    let store = open_store(&url, &credentials()).unwrap();
    assert!(matches!(open(store.clone()), Err(RepoError::NoRepository(_))));
    let repository = create(store.clone());
    // More than one pack, one of them whole.
    let mut data = noise(1, 120 << 20);
    data[50 << 20..52 << 20].fill(0);
    let point = put_point(&repository, 1, &data).unwrap();
    let other = open(open_store(&url, &credentials()).unwrap()).unwrap();
    let found = other.points(Some(GROUP)).unwrap().remove(0).unwrap();
    assert_eq!(found, point);
    assert!(read_disk(&other, &found.disks[0].root).unwrap() == data);
    let again = Repository::create(store.clone(), &passphrase(), &Default::default());
    assert!(matches!(again, Err(RepoError::AlreadyExists { .. })));
    let never = AtomicBool::new(false);
    assert_eq!(scrub(&*store, &|_, _| {}, &never).unwrap().damage, Vec::<String>::new());
    assert!(other.stats().unwrap().stored_bytes > 50 << 20);
    // Beside it, in the same bucket, another one.
    let beside = open_store(&service.url("works/a/pre"), &credentials()).unwrap();
    assert!(matches!(open(beside), Err(RepoError::NoRepository(_))));
}

fn a_create_is_conditional_and_knows_its_own_earlier_success(service: &S3Service) {
    let store = open_store(&service.url("conditional"), &credentials()).unwrap();
    let run = |key: &'static str, data: &'static str| {
        let store = store.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move { store.create(key, data.into()).await })
    };
    run("points/x", "one").unwrap();
    run("points/x", "one").unwrap();
    assert!(matches!(run("points/x", "two"), Err(RepoError::AlreadyExists { .. })));
    assert!(matches!(run("points/x", "onf"), Err(RepoError::AlreadyExists { .. })));
}

fn a_wrong_key_is_access_denied_at_once(service: &S3Service) {
    for (id, secret) in [(ACCESS_KEY, "wrong"), ("nobody", "wrong")] {
        let credentials = StoreCredentials {
            access_key_id: Some(id.into()),
            secret_access_key: Some(secret.into()),
            session_token: None,
        };
        let begun = Instant::now();
        let refused = open(open_store(&service.url("denied"), &credentials).unwrap());
        assert!(matches!(refused, Err(RepoError::AccessDenied { .. })), "{refused:?}");
        assert!(begun.elapsed() < Duration::from_secs(5), "no use in trying again");
    }
}

fn a_missing_bucket_is_named_at_once(service: &S3Service) {
    let store =
        open_store(&service.url("x").replace(BUCKET, "no-such-bucket"), &credentials()).unwrap();
    let begun = Instant::now();
    let refused = open(store.clone());
    assert!(
        matches!(&refused, Err(RepoError::NoSuchStore { store, .. }) if store.contains("no-such-bucket")),
        "{refused:?}"
    );
    let refused = Repository::create(store, &passphrase(), &Default::default());
    assert!(matches!(refused, Err(RepoError::NoSuchStore { .. })), "{refused:?}");
    assert!(begun.elapsed() < Duration::from_secs(5));
}

fn no_route_and_silence_are_unreachable_after_retries_and_name_the_endpoint(service: &S3Service) {
    let place = Place::new(service, "silence");
    let nobody = "s3://silence?endpoint=http://127.0.0.1:9&retry_seconds=2&timeout_seconds=1";
    let refused = open(open_store(nobody, &credentials()).unwrap());
    let Err(RepoError::Unreachable { store, attempts, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert!(store.contains("127.0.0.1:9") && attempts > 1, "{store} {attempts}");
    let repository = open(
        open_store(&place.url.replace("retry_seconds=8", "retry_seconds=2"), &credentials())
            .unwrap(),
    )
    .unwrap();
    place.proxy.misbehave(Misbehaviour::BlackHole);
    let begun = Instant::now();
    let failed = put_point(&repository, 1, &noise(1, 3 * C));
    assert!(matches!(failed, Err(RepoError::Unreachable { .. })), "{failed:?}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(place.points(), 0);
    place.assert_next_run(2);
    // Reads have deadlines of their own.
    let point = repository.points(None).unwrap().remove(0).unwrap();
    place.proxy.misbehave(Misbehaviour::BlackHole);
    let begun = Instant::now();
    let failed = read_disk(&repository, &point.disks[0].root);
    assert!(matches!(failed, Err(RepoError::Unreachable { .. })), "{failed:?}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

fn unavailable_is_tried_again_with_pauses_and_in_the_end_given_up(service: &S3Service) {
    let place = Place::new(service, "unavailable");
    let repository = place.open();
    place.proxy.misbehave(Misbehaviour::Unavailable(3));
    let begun = Instant::now();
    put_point(&repository, 1, &noise(1, 3 * C)).unwrap();
    assert_eq!(place.proxy.hits(), 3);
    assert!(begun.elapsed() > Duration::from_millis(600), "no pauses: {:?}", begun.elapsed());
    place.proxy.misbehave(Misbehaviour::Unavailable(usize::MAX));
    let failed = put_point(&repository, 2, &noise(2, 3 * C));
    let Err(RepoError::Unreachable { attempts, detail, .. }) = failed else { panic!("{failed:?}") };
    assert!(attempts >= 4 && detail.contains("503"), "{attempts}: {detail}");
    assert_eq!(place.points(), 1);
    place.assert_next_run(3);
}

fn an_upload_cut_in_the_middle_is_repeated_or_leaves_no_restore_point(service: &S3Service) {
    let place = Place::new(service, "cut");
    let repository = place.open();
    place.proxy.misbehave(Misbehaviour::CutUpload { times: 2, bytes: 300_000 });
    let data = noise(1, 20 << 20);
    let point = put_point(&repository, 1, &data).unwrap();
    assert_eq!(place.proxy.hits(), 2);
    assert!(read_disk(&place.open(), &point.disks[0].root).unwrap() == data);
    place.proxy.misbehave(Misbehaviour::CutUpload { times: usize::MAX, bytes: 300_000 });
    let failed = put_point(&repository, 2, &noise(2, 20 << 20));
    assert!(matches!(failed, Err(RepoError::Unreachable { .. })), "{failed:?}");
    assert_eq!(place.points(), 1);
    place.assert_next_run(3);
}

fn a_lost_answer_to_any_request_does_no_harm(service: &S3Service) {
    let place = Place::new(service, "lost");
    let repository = place.open();
    for n in 1..4 {
        place.proxy.misbehave(Misbehaviour::LoseAnswer(usize::try_from(n).unwrap()));
        put_point(&repository, n, &noise(u64::from(n), 40 * C)).unwrap();
        assert_eq!(place.proxy.hits(), n as usize);
        assert_eq!(place.points(), n as usize);
    }
    place.assert_next_run(9);
}

fn a_full_store_is_named_at_once(service: &S3Service) {
    let place = Place::new(service, "full");
    let repository = place.open();
    place.proxy.misbehave(Misbehaviour::Full(1));
    let failed = put_point(&repository, 1, &noise(1, 3 * C));
    assert!(matches!(failed, Err(RepoError::NoSpace { .. })), "{failed:?}");
    assert_eq!(place.proxy.hits(), 1);
    assert_eq!(place.points(), 0);
    place.assert_next_run(2);
}

#[test]
fn urls_and_credentials_that_make_no_sense_are_refused_with_the_reason() {
    let credentials = credentials();
    for (url, reason) in [
        ("s3://", "bucket"),
        ("s3://b?endpoint=ftp://x", "http://"),
        ("s3://b?endpoint=http://user:pass@x", "credentials"),
        ("s3://user:pass@b", "credentials"),
        ("s3://b?colour=red", "colour"),
        ("s3://b?retry_seconds=soon", "retry_seconds"),
        ("s3://b/a%20b?endpoint=http://x", "key"),
        ("s3://b?endpoint=x", "endpoint"),
        ("gopher://x/y", "gopher"),
        ("file://host/x", "folder"),
    ] {
        match open_store(url, &credentials) {
            Err(RepoError::Invalid(why)) => assert!(why.contains(reason), "{url}: {why}"),
            other => panic!("{url}: {:?}", other.map(|s| s.describe())),
        }
    }
}
