//! exec probes: CRI ExecSync (contract B-06).

use k8s_openapi::api::core::v1 as corev1;
use tonic::Code;

use super::{
    net_error::go_seconds,
    prober::{Outcome, ProbeError},
    schedule,
};
use crate::cri::RuntimeService;

/// No more than this of a command's output goes into a message.
const OUTPUT_LIMIT: usize = 10 * 1024;

/// One try. References `$(NAME)` to environment variables with a literal value are replaced in the command.
pub(super) async fn attempt(
    runtime: &dyn RuntimeService,
    action: &corev1::ExecAction,
    container: &corev1::Container,
    container_id: &str,
    probe: &corev1::Probe,
) -> Result<Outcome, ProbeError> {
    let command: Vec<String> = action.command.iter().flatten().map(|word| expand(word, container)).collect();
    let timeout = schedule::timeout(probe);
    match runtime.exec_sync(container_id, command.clone(), timeout).await {
        Ok(response) if response.exit_code == 0 => Ok(Outcome::Success),
        Ok(response) => {
            let mut output = response.stdout;
            output.extend_from_slice(&response.stderr);
            output.truncate(OUTPUT_LIMIT);
            Ok(Outcome::Failure(String::from_utf8_lossy(&output).into_owned()))
        }
        Err(error) if error.code == Code::DeadlineExceeded => Ok(Outcome::Failure(format!(
            "command timed out: {:?} timed out after {}",
            command.join(" "),
            go_seconds(timeout.as_secs())
        ))),
        Err(error) => Err(ProbeError::unknown(error.to_string())),
    }
}

/// `$(NAME)` → the literal value of that variable of this container, `$$` → `$`; everything else stays as it is.
fn expand(word: &str, container: &corev1::Container) -> String {
    let mut out = String::with_capacity(word.len());
    let mut rest = word;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(escaped) = after.strip_prefix('$') {
            out.push('$');
            rest = escaped;
        } else if let Some((name, tail)) = after.strip_prefix('(').and_then(|a| a.split_once(')')) {
            // The last one of a name wins, as in the container's own environment.
            let value = container.env.iter().flatten().rev().find(|e| e.name == name);
            match value {
                Some(variable) => out.push_str(variable.value.as_deref().unwrap_or_default()),
                None => out.push_str(&format!("$({name})")),
            }
            rest = tail;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::*;
    use crate::{
        cri::{
            fake::{ExecScript, FakeRuntime, Fault},
            fixtures::running,
        },
        time::SystemClock,
    };

    #[tokio::test(start_paused = true)]
    async fn b06_exit_codes_timeouts_and_the_output_that_is_shown() {
        let fake = FakeRuntime::new(Arc::new(SystemClock));
        let (_, id) = running(&fake, "u", "c").await;
        let action = corev1::ExecAction { command: Some(vec!["sh".into(), "-c".into(), "x".into()]) };
        let probe = corev1::Probe { timeout_seconds: Some(2), ..Default::default() };
        let container = corev1::Container::default();
        let once = async || attempt(&fake, &action, &container, &id, &probe).await;
        assert_eq!(once().await, Ok(Outcome::Success));
        let failing = |code: i32, out: &[u8], err: &[u8]| ExecScript {
            after: Duration::ZERO,
            exit_code: code,
            stdout: out.to_vec(),
            stderr: err.to_vec(),
        };
        fake.exec_script("c", failing(3, b"out ", b"err"));
        assert_eq!(once().await, Ok(Outcome::Failure("out err".into())));
        fake.exec_script("c", failing(1, &[b'x'; 11 * 1024], b""));
        let Ok(Outcome::Failure(shown)) = once().await else { panic!() };
        assert_eq!(shown.len(), 10 * 1024);
        fake.inject("ExecSync", 1, Fault::Deadline { after: Duration::from_secs(2), done: false });
        let late = "command timed out: \"sh -c x\" timed out after 2s";
        assert_eq!(once().await, Ok(Outcome::Failure(late.into())));
        fake.inject("ExecSync", 1, Fault::error("container not found"));
        assert_eq!(once().await, Err(ProbeError::unknown("rpc error: code = Unknown desc = container not found")));
    }

    #[test]
    fn b06_literal_variables_are_expanded() {
        let env = |name: &str, value: &str| corev1::EnvVar {
            name: name.into(),
            value: Some(value.into()),
            ..Default::default()
        };
        let container =
            corev1::Container { env: Some(vec![env("A", "1"), env("B", "b"), env("A", "2")]), ..Default::default() };
        let cases = [
            ("$(A)", "2"),
            ("x$(A)y$(B)", "x2yb"),
            ("$$(A)", "$(A)"),
            ("$(NO)", "$(NO)"),
            ("$(A", "$(A"),
            ("a$", "a$"),
            ("$X", "$X"),
        ];
        for (word, want) in cases {
            assert_eq!(expand(word, &container), want, "{word}");
        }
    }
}
