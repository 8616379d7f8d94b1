//! `GET /containerLogs/{namespace}/{pod}/{container}` (contract E-06).

use std::{convert::Infallible, path::Path};

use bytes::Bytes;
use futures::{StreamExt, future::BoxFuture};
use http_body_util::{BodyExt, StreamBody};
use hyper::{Response, StatusCode, body::Frame, header};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ContainerStatus, PodStatus};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::{
    Call, ServerParts,
    reply::{self, Reply},
    routes,
};
use crate::{
    cri::v1::ContainerState,
    logs::{LogOptions, StreamChoice, read_logs},
    pods::Pod,
};

pub(super) async fn container_logs(parts: &ServerParts, call: Call) -> Reply {
    let [namespace, name, container] = call.arguments.as_slice() else { return reply::not_found() };
    let asked = match Asked::from_query(&routes::query(call.request.uri()), parts.clock.now().wall) {
        Ok(asked) => asked,
        Err((status, message)) => return reply::text(status, message),
    };
    let Some(pod) = parts.pods.find(namespace, name) else {
        return reply::text(StatusCode::NOT_FOUND, &format!("pod {name:?} does not exist"));
    };
    if !has_container(&pod, container) {
        let message = format!("container {container:?} not found in pod {name:?}");
        return reply::text(StatusCode::NOT_FOUND, &message);
    }
    let status = (parts.status)(pod.uid()).unwrap_or_else(|| pod.api_status().clone());
    match container_with_logs(&status, container, name, asked.previous) {
        Ok(container_id) => stream(parts, container_id, asked.options, call.peer.stopping),
        Err(message) => reply::text(StatusCode::BAD_REQUEST, &message),
    }
}

/// The request's PodLogOptions.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    options: LogOptions,
    previous: bool,
}

type Refusal = (StatusCode, &'static str);
const UNDECODABLE: Refusal = (StatusCode::BAD_REQUEST, "{\"message\": \"Unable to decode query.\"}");
const INVALID: Refusal = (StatusCode::UNPROCESSABLE_ENTITY, "{\"message\": \"Invalid request.\"}");

impl Asked {
    fn from_query(query: &[(String, String)], now: Timestamp) -> Result<Self, Refusal> {
        let get = |name: &str| query.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str());
        // As upstream reads a boolean: whatever is not a "no" is a "yes", the empty string too.
        let flag = |name: &str| get(name).is_some_and(|v| v != "0" && !v.eq_ignore_ascii_case("false"));
        let number = |value: Option<&str>| -> Result<Option<i64>, Refusal> {
            value.map(|v| v.parse().map_err(|_| UNDECODABLE)).transpose()
        };
        // `tail` is an older name of tailLines; `all` means no limit.
        let tail = match get("tail").filter(|t| !t.is_empty()) {
            Some("all") => None,
            Some(tail) => Some(tail),
            None => get("tailLines"),
        };
        let (tail, limit) = (number(tail)?, number(get("limitBytes"))?);
        let since_seconds = number(get("sinceSeconds"))?;
        let since_time = match get("sinceTime").filter(|t| !t.is_empty() && *t != "null") {
            Some(text) => Some(text.parse::<Timestamp>().map_err(|_| UNDECODABLE)?),
            None => None,
        };
        let out_of_range =
            tail.is_some_and(|n| n < 0) || limit.is_some_and(|n| n < 1) || since_seconds.is_some_and(|n| n < 1);
        let stream = match get("stream").unwrap_or("All") {
            "All" => StreamChoice::All,
            "Stdout" => StreamChoice::Stdout,
            "Stderr" => StreamChoice::Stderr,
            _ => return Err(INVALID),
        };
        let tail_of_one_stream = tail.is_some() && stream != StreamChoice::All;
        if out_of_range || (since_seconds.is_some() && since_time.is_some()) || tail_of_one_stream {
            return Err(INVALID);
        }
        let since = since_seconds.map(|s| now.saturating_sub(SignedDuration::from_secs(s)).unwrap_or(Timestamp::MIN));
        let options = LogOptions {
            follow: flag("follow"),
            tail_lines: tail.and_then(|n| u64::try_from(n).ok()),
            limit_bytes: limit.and_then(|n| u64::try_from(n).ok()),
            since: since.or(since_time),
            timestamps: flag("timestamps"),
            stream,
        };
        Ok(Self { options, previous: flag("previous") })
    }
}

fn has_container(pod: &Pod, name: &str) -> bool {
    pod.container(name).is_some()
}

/// The ID of the container whose log answers the question, or upstream's words for why there is none.
fn container_with_logs(status: &PodStatus, container: &str, pod: &str, previous: bool) -> Result<String, String> {
    let lists = [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses];
    let found: Option<&ContainerStatus> = lists.into_iter().flatten().flatten().find(|c| c.name == container);
    let Some(found) = found else {
        return Err(format!("container {container:?} in pod {pod:?} is not available"));
    };
    let last = found.last_state.as_ref().and_then(|s| s.terminated.as_ref());
    let last_id = last.and_then(|t| t.container_id.clone()).filter(|id| !id.is_empty());
    let terminated = || format!("container {container:?} in pod {pod:?} is terminated");
    if previous {
        return last_id.ok_or_else(|| format!("previous terminated container {container:?} in pod {pod:?} not found"));
    }
    let state = found.state.clone().unwrap_or_default();
    if state.running.is_some() {
        return Ok(found.container_id.clone().unwrap_or_default());
    }
    if let Some(now) = state.terminated {
        return now.container_id.filter(|id| !id.is_empty()).or(last_id).ok_or_else(terminated);
    }
    if last.is_some() {
        return last_id.ok_or_else(terminated);
    }
    let waiting = format!("container {container:?} in pod {pod:?} is waiting to start");
    Err(match state.waiting.map(|w| w.reason.unwrap_or_default()) {
        Some(reason) if reason == "ErrImagePull" => format!("{waiting}: image can't be pulled"),
        Some(reason) if reason == "ImagePullBackOff" => format!("{waiting}: trying and failing to pull image"),
        Some(reason) => format!("{waiting}: {reason}"),
        None => format!("{waiting} - no logs yet"),
    })
}

/// Begins the response at once, as upstream does: a follower of a silent container sees it, and a later error stands in the text.
fn stream(parts: &ServerParts, container_id: String, options: LogOptions, stopping: CancellationToken) -> Reply {
    let (out, pieces) = mpsc::channel::<Bytes>(4);
    let runtime = parts.runtime.clone();
    tokio::spawn(async move {
        let id = container_id.rsplit("//").next().unwrap_or_default().to_owned();
        let log_path = runtime.container_status(&id).await.map(|status| status.log_path).unwrap_or_default();
        let running = || -> BoxFuture<'static, bool> {
            let (runtime, id) = (runtime.clone(), id.clone());
            Box::pin(async move {
                match runtime.container_status(&id).await {
                    Ok(status) => status.state() == ContainerState::ContainerRunning,
                    // Containers run on while their runtime restarts.
                    Err(error) => matches!(error.code, Code::Unavailable | Code::DeadlineExceeded),
                }
            })
        };
        let failed = if log_path.is_empty() {
            Some(format!("unable to retrieve container logs for {container_id}"))
        } else {
            tokio::select! {
                () = stopping.cancelled() => None,
                read = read_logs(Path::new(&log_path), options, &out, &running) => read.err().map(|e| e.to_string()),
            }
        };
        if let Some(message) = failed {
            // Nobody listening is no error.
            let _ = out.send(message.into()).await;
        }
    });
    let frames = ReceiverStream::new(pieces).map(|piece| Ok::<_, Infallible>(Frame::data(piece)));
    let mut reply = Response::new(BodyExt::boxed(StreamBody::new(frames)));
    reply.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    reply
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{
        ContainerState as State, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    };

    use super::*;

    fn running() -> State {
        State { running: Some(ContainerStateRunning::default()), ..Default::default() }
    }
    fn waiting(reason: &str) -> State {
        let waiting = ContainerStateWaiting { reason: Some(reason.into()), ..Default::default() };
        State { waiting: Some(waiting), ..Default::default() }
    }
    fn terminated(id: &str) -> State {
        let terminated = ContainerStateTerminated { container_id: Some(id.into()), ..Default::default() };
        State { terminated: Some(terminated), ..Default::default() }
    }

    #[test]
    fn e06_which_container_answers() {
        let cases = [
            (running(), None, false, Ok("cd://now")),
            (running(), Some(terminated("cd://last")), true, Ok("cd://last")),
            (running(), None, true, Err("previous terminated container \"c\" in pod \"p\" not found")),
            (terminated("cd://ended"), None, false, Ok("cd://ended")),
            (terminated(""), Some(terminated("cd://last")), false, Ok("cd://last")),
            (terminated(""), None, false, Err("container \"c\" in pod \"p\" is terminated")),
            (waiting("CrashLoopBackOff"), Some(terminated("cd://last")), false, Ok("cd://last")),
            (
                waiting("ContainerCreating"),
                None,
                false,
                Err("container \"c\" in pod \"p\" is waiting to start: ContainerCreating"),
            ),
            (
                waiting("ErrImagePull"),
                None,
                false,
                Err("container \"c\" in pod \"p\" is waiting to start: image can't be pulled"),
            ),
            (
                waiting("ImagePullBackOff"),
                None,
                false,
                Err("container \"c\" in pod \"p\" is waiting to start: trying and failing to pull image"),
            ),
            (State::default(), None, false, Err("container \"c\" in pod \"p\" is waiting to start - no logs yet")),
        ];
        for (state, last_state, previous, want) in cases {
            let container = ContainerStatus {
                name: "c".into(),
                container_id: Some("cd://now".into()),
                state: Some(state),
                last_state,
                ..Default::default()
            };
            let status = PodStatus { container_statuses: Some(vec![container]), ..Default::default() };
            let got = container_with_logs(&status, "c", "p", previous);
            assert_eq!(got, want.map(str::to_owned).map_err(str::to_owned));
        }
        let none = container_with_logs(&PodStatus::default(), "c", "p", false);
        assert_eq!(none.unwrap_err(), "container \"c\" in pod \"p\" is not available");
    }

    #[test]
    fn e06_query() {
        let now = Timestamp::from_second(1000).unwrap();
        let ask = |query: &str| {
            let uri = format!("/x?{query}").parse().unwrap();
            Asked::from_query(&routes::query(&uri), now)
        };
        let got = ask("follow=true&tailLines=5&limitBytes=7&sinceSeconds=10&timestamps=1&previous=").unwrap();
        let options = LogOptions {
            follow: true,
            tail_lines: Some(5),
            limit_bytes: Some(7),
            since: Timestamp::from_second(990).ok(),
            timestamps: true,
            stream: StreamChoice::All,
        };
        assert_eq!(got, Asked { options, previous: true });
        assert_eq!(
            ask("follow=false&tail=3").unwrap().options,
            LogOptions { tail_lines: Some(3), ..Default::default() }
        );
        assert_eq!(ask("tail=all&tailLines=3").unwrap().options, LogOptions::default());
        assert_eq!(ask("sinceTime=1970-01-01T00:00:05Z").unwrap().options.since, Timestamp::from_second(5).ok());
        assert_eq!(ask("stream=All&tailLines=1").unwrap().options.stream, StreamChoice::All);
        assert_eq!(ask("stream=Stderr").unwrap().options.stream, StreamChoice::Stderr);
        for undecodable in ["tailLines=x", "sinceTime=yesterday"] {
            assert_eq!(ask(undecodable), Err(UNDECODABLE), "{undecodable}");
        }
        for invalid in [
            "tailLines=-1",
            "limitBytes=0",
            "sinceSeconds=0",
            "sinceSeconds=1&sinceTime=1970-01-01T00:00:05Z",
            "stream=Both",
            "stream=Stderr&tailLines=1",
        ] {
            assert_eq!(ask(invalid), Err(INVALID), "{invalid}");
        }
    }
}
