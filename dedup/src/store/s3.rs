//! S3 and services like it, through `object_store`. Its own retries are off: ours give typed errors,
//! say how often they tried, and know that a create whose answer was lost may have happened.

use std::ops::Range;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::TryStreamExt;
use object_store::aws::{AmazonS3, AmazonS3Builder, S3ConditionalPut};
use object_store::list::{PaginatedListOptions, PaginatedListStore};
use object_store::path::Path;
use object_store::{
    ClientOptions, GetOptions, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    RetryConfig,
};
use url::Url;

use super::retry::{Failure, Policy};
use super::{ObjectInfo, Store, StoreCredentials, check_key};
use crate::error::{RepoError, Result};

/// How much of each end is compared when a create finds its key taken: for the objects of this crate,
/// which end in a hash of all before, that decides whether they are the same.
const COMPARED: u64 = 64 * 1024;
/// More than any object: reads watch over their progress themselves.
const LONGEST_READ: u64 = 1 << 30;
const RETRY_SECONDS: u64 = 60;
const TIMEOUT_SECONDS: u64 = 30;

/// A bucket, or a part of one.
pub(super) struct S3Store {
    client: AmazonS3,
    name: String,
    prefix: String,
    policy: Policy,
}

/// Options of the URL.
struct Options {
    endpoint: Option<String>,
    region: String,
    virtual_host: bool,
    policy: Policy,
}

impl Options {
    fn parse(url: &Url) -> Result<Self> {
        let mut options = Self {
            endpoint: None,
            region: "us-east-1".into(),
            virtual_host: false,
            policy: Policy {
                give_up_after: Duration::from_secs(RETRY_SECONDS),
                timeout: Duration::from_secs(TIMEOUT_SECONDS),
            },
        };
        for (name, value) in url.query_pairs() {
            let seconds = || match value.parse::<u64>() {
                Ok(n @ 1..=86_400) => Ok(Duration::from_secs(n)),
                _ => Err(RepoError::Invalid(format!("{name}={value}: not a number of seconds"))),
            };
            match &*name {
                "endpoint" => options.endpoint = Some(endpoint(&value)?),
                "region" => options.region = value.into_owned(),
                "virtual_host" => options.virtual_host = value == "true",
                "retry_seconds" => options.policy.give_up_after = seconds()?,
                "timeout_seconds" => options.policy.timeout = seconds()?,
                other => {
                    return Err(RepoError::Invalid(format!(
                        "{other:?} is no option of an S3 URL; there are endpoint, region, \
                         virtual_host, retry_seconds and timeout_seconds"
                    )));
                }
            }
        }
        Ok(options)
    }
}

fn endpoint(value: &str) -> Result<String> {
    let bad = |why: &str| RepoError::Invalid(format!("endpoint {value:?}: {why}"));
    let url = Url::parse(value).map_err(|e| bad(&e.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err(bad("write http://host:port or https://host"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad("credentials do not belong into a URL"));
    }
    Ok(value.trim_end_matches('/').to_owned())
}

impl S3Store {
    pub(super) fn open(url: &Url, credentials: &StoreCredentials) -> Result<Self> {
        let options = Options::parse(url)?;
        let bucket = url
            .host_str()
            .filter(|host| !host.is_empty())
            .ok_or_else(|| RepoError::Invalid(format!("{url}: write s3://bucket/prefix")))?;
        let prefix = url.path().trim_matches('/').to_owned();
        if !prefix.is_empty() {
            check_key(&prefix)?;
        }
        let name = describe(bucket, &prefix, options.endpoint.as_deref());
        let client = Self::client(bucket, &options, credentials)
            .map_err(|detail| RepoError::Invalid(format!("{name}: {detail}")))?;
        Ok(Self { client, name, prefix, policy: options.policy })
    }

    fn client(
        bucket: &str,
        options: &Options,
        credentials: &StoreCredentials,
    ) -> std::result::Result<AmazonS3, String> {
        let from = |given: &Option<String>, variable: &str| {
            given.clone().or_else(|| std::env::var(variable).ok()).filter(|v| !v.is_empty())
        };
        let missing = |what: &str, variable: &str| {
            format!("no {what}; give it in the target's credentials file or in {variable}")
        };
        let id = from(&credentials.access_key_id, "AWS_ACCESS_KEY_ID")
            .ok_or_else(|| missing("access key", "AWS_ACCESS_KEY_ID"))?;
        let secret = from(&credentials.secret_access_key, "AWS_SECRET_ACCESS_KEY")
            .ok_or_else(|| missing("secret key", "AWS_SECRET_ACCESS_KEY"))?;
        let plain_http = options.endpoint.as_ref().is_some_and(|e| e.starts_with("http://"));
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(bucket)
            .with_region(&options.region)
            .with_access_key_id(id)
            .with_secret_access_key(secret)
            // Path style unless asked otherwise: it is what every service of its own knows.
            .with_virtual_hosted_style_request(options.virtual_host)
            .with_conditional_put(S3ConditionalPut::ETagMatch)
            // Over plain HTTP the signature covers the content; TLS protects it by itself, and
            // hashing it again would cost as much as all the rest.
            .with_unsigned_payload(!plain_http)
            .with_retry(RetryConfig { max_retries: 0, ..Default::default() })
            .with_client_options(
                ClientOptions::new()
                    .with_allow_http(plain_http)
                    .with_connect_timeout(options.policy.timeout.min(Duration::from_secs(10)))
                    .with_timeout_disabled(),
            );
        if let Some(endpoint) = &options.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        // A session token belongs to the keys that it came with.
        let token = if credentials.access_key_id.is_some() {
            credentials.session_token.clone()
        } else {
            from(&credentials.session_token, "AWS_SESSION_TOKEN")
        };
        if let Some(token) = token {
            builder = builder.with_token(token);
        }
        builder.build().map_err(|e| e.to_string())
    }

    fn path(&self, key: &str) -> Result<Path> {
        check_key(key)?;
        Ok(Path::from(self.full_key(key)))
    }

    fn full_key(&self, key: &str) -> String {
        match self.prefix.as_str() {
            "" => key.to_owned(),
            prefix => format!("{prefix}/{key}"),
        }
    }

    /// Whether a failed request is worth another, and if not, what it means.
    fn failure(&self, op: &'static str, key: &str, error: &object_store::Error) -> Failure {
        use object_store::Error as E;
        let store = self.name.clone();
        let text = chain(error);
        let detail = excerpt(&text);
        let key = key.to_owned();
        let status = status(&text);
        // Listings wrap the same failures in another type: the status counts first.
        match error {
            E::NotFound { .. } | E::Generic { .. } if text.contains("NoSuchBucket") => {
                Failure::Final(RepoError::NoSuchStore { store, detail })
            }
            E::NotFound { .. } => Failure::Final(RepoError::Missing { store, key }),
            // S3 answers 409 while another conditional create of the same key is under way: it is
            // told apart from a taken key by looking, in `create_parts`.
            E::AlreadyExists { .. } | E::Precondition { .. } => {
                Failure::Final(RepoError::AlreadyExists { store, key })
            }
            _ if text.contains("RequestTimeTooSkewed") => {
                let detail = format!("set this host's clock: {detail}");
                Failure::Final(RepoError::AccessDenied { store, detail })
            }
            E::PermissionDenied { .. } | E::Unauthenticated { .. } => {
                Failure::Final(RepoError::AccessDenied { store, detail })
            }
            _ if matches!(status, Some(401 | 403)) => {
                Failure::Final(RepoError::AccessDenied { store, detail })
            }
            _ if status == Some(507) || no_space(&text) => {
                Failure::Final(RepoError::NoSpace { store, detail })
            }
            _ if matches!(status, Some(501)) => Failure::Final(RepoError::Store {
                store,
                op,
                key,
                detail: format!("the service does not offer what is needed: {detail}"),
            }),
            _ => match status {
                Some(status) if status < 500 && status != 408 && status != 429 => {
                    Failure::Final(RepoError::Store { store, op, key, detail })
                }
                // Refused, cut, timed out, overloaded.
                _ => Failure::Transient(detail),
            },
        }
    }

    /// Tries one request again and again.
    async fn run<T, F>(
        &self,
        op: &'static str,
        key: &str,
        bytes: u64,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        self.policy
            .run(&self.name, bytes, || {
                let attempt = attempt();
                async move { attempt.await.map_err(|e| self.failure(op, key, &e)) }
            })
            .await
    }

    /// Reads an object or a part of it. However long that takes: each piece has its deadline.
    async fn read(&self, key: &str, options: GetOptions, policy: Policy) -> Result<Bytes> {
        let path = self.path(key)?;
        let attempt = || async {
            let failed = |e: object_store::Error| self.failure("read", key, &e);
            let silent = |_| {
                let seconds = self.policy.timeout.as_secs();
                Failure::Transient(format!("no answer, or no more of it, for {seconds} s"))
            };
            let answer = self.client.get_opts(&path, options.clone());
            let result = tokio::time::timeout(self.policy.timeout, answer)
                .await
                .map_err(silent)?
                .map_err(failed)?;
            let mut pieces = Vec::new();
            let mut stream = result.into_stream();
            loop {
                let piece = tokio::time::timeout(self.policy.timeout, stream.try_next());
                match piece.await.map_err(silent)?.map_err(failed)? {
                    Some(piece) => pieces.push(piece),
                    None => break,
                }
            }
            Ok(match pieces.len() {
                1 => pieces.swap_remove(0),
                _ => pieces.concat().into(),
            })
        };
        policy.run(&self.name, LONGEST_READ, attempt).await
    }

    async fn read_range(&self, key: &str, range: Range<u64>, policy: Policy) -> Result<Bytes> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let options = GetOptions { range: Some(range.into()), ..Default::default() };
        self.read(key, options, policy).await
    }

    /// Whether an object is the one that we meant to create.
    async fn is_ours(&self, key: &str, parts: &[Bytes]) -> Result<bool> {
        let len: u64 = parts.iter().map(|part| part.len() as u64).sum();
        if self.size(key).await? != len {
            return Ok(false);
        }
        for range in [0..len.min(COMPARED), len.saturating_sub(COMPARED)..len] {
            if range.is_empty() {
                continue;
            }
            if self.get_range(key, range.clone()).await? != slice(parts, range) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[async_trait]
impl Store for S3Store {
    fn describe(&self) -> String {
        self.name.clone()
    }

    async fn create(&self, key: &str, data: Bytes) -> Result<()> {
        self.create_parts(key, vec![data]).await
    }

    async fn create_parts(&self, key: &str, parts: Vec<Bytes>) -> Result<()> {
        let path = self.path(key)?;
        let len = parts.iter().map(|part| part.len() as u64).sum();
        let payload: PutPayload = parts.iter().cloned().collect();
        // The look at a taken key may find that nothing is there: the create that was in our way
        // failed. Then it is our turn again.
        for _ in 0..3 {
            let created = self
                .run("create", key, len, || {
                    let options = PutOptions { mode: PutMode::Create, ..Default::default() };
                    self.client.put_opts(&path, payload.clone(), options)
                })
                .await;
            match created {
                Err(e @ RepoError::AlreadyExists { .. }) => match self.is_ours(key, &parts).await {
                    Ok(true) => return Ok(()),
                    Ok(false) => return Err(e),
                    Err(RepoError::Missing { .. }) => {}
                    Err(e) => return Err(e),
                },
                result => return result.map(drop),
            }
        }
        Err(RepoError::Store {
            store: self.name.clone(),
            op: "create",
            key: key.to_owned(),
            detail: "another writer of the same key is in the way".into(),
        })
    }

    async fn get(&self, key: &str) -> Result<Bytes> {
        self.read(key, GetOptions::default(), self.policy).await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.read_range(key, range, self.policy).await
    }

    async fn get_range_once(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.read_range(key, range, self.policy.once()).await
    }

    async fn size(&self, key: &str) -> Result<u64> {
        let path = self.path(key)?;
        self.run("look at", key, 0, || self.client.head(&path)).await.map(|meta| meta.size)
    }

    async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        // By the very characters, unlike the client's ordinary listing: `config` must not list the
        // whole repository.
        let full = self.full_key(prefix);
        let strip = full.len() - prefix.len();
        let (mut objects, mut token) = (Vec::new(), None);
        loop {
            let page = self
                .run("list", prefix, 0, || {
                    let page_token = token.clone();
                    let options = PaginatedListOptions { page_token, ..Default::default() };
                    self.client.list_paginated(Some(&full), options)
                })
                .await?;
            objects.extend(page.result.objects.into_iter().filter_map(|meta| {
                let key = meta.location.as_ref().get(strip..)?.to_owned();
                (key.starts_with(prefix) && check_key(&key).is_ok())
                    .then_some(ObjectInfo { key, size: meta.size })
            }));
            if page.page_token.is_none() || page.page_token == token {
                break;
            }
            token = page.page_token;
        }
        objects.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(objects)
    }

    async fn delete(&self, key: &str) -> Result<()> {
        let path = self.path(key)?;
        match self.run("delete", key, 0, || self.client.delete(&path)).await {
            Err(RepoError::Missing { .. }) => Ok(()),
            result => result,
        }
    }
}

fn describe(bucket: &str, prefix: &str, endpoint: Option<&str>) -> String {
    let mut name = format!("s3://{bucket}");
    if !prefix.is_empty() {
        name = format!("{name}/{prefix}");
    }
    if let Some(endpoint) = endpoint {
        name = format!("{name} at {endpoint}");
    }
    name
}

/// The messages of an error and its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let line = error.to_string();
        if !text.contains(&line) {
            text = format!("{text}: {line}");
        }
        cause = error.source();
    }
    text
}

/// The HTTP status in the client's message; its error type is not public.
fn status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("non-2xx status code: ")?;
    rest.get(..3)?.parse().ok()
}

fn no_space(text: &str) -> bool {
    ["InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "no space left", "No space left"]
        .iter()
        .any(|sign| text.contains(sign))
}

/// Enough of a message to act on.
fn excerpt(text: &str) -> String {
    const MOST: usize = 400;
    let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match flat.char_indices().nth(MOST) {
        Some((at, _)) => format!("{}…", &flat[..at]),
        None => flat,
    }
}

/// A range of data in pieces.
fn slice(parts: &[Bytes], range: Range<u64>) -> Vec<u8> {
    let mut out = Vec::with_capacity((range.end - range.start) as usize);
    let mut at = 0u64;
    for part in parts {
        let end = at + part.len() as u64;
        let (from, to) = (range.start.max(at), range.end.min(end));
        if from < to {
            out.extend_from_slice(&part[(from - at) as usize..(to - at) as usize]);
        }
        at = end;
    }
    out
}
