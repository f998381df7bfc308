//! Errors as sentences for people and logs.

/// An error and what caused it, as one sentence. A cause that the sentence names already is not named again: errors of
/// some libraries print their causes themselves.
pub fn sentence(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |sentence, cause| match cause.to_string() {
        cause if sentence.is_empty() => cause,
        cause if sentence.ends_with(&cause) => sentence,
        cause => format!("{sentence}: {cause}"),
    })
}

/// Says that nothing goes by `name` where `known` names do, and which of them may be meant.
pub fn unknown_name(what: &str, name: &str, known: &[&str]) -> String {
    let meant = nearest(name, known).map(|nearest| format!("; did you mean `{nearest}`?")).unwrap_or_default();
    let listed: Vec<String> = known.iter().map(|known| format!("`{known}`")).collect();
    let listed = match listed.as_slice() {
        [] => "there are none".to_owned(),
        [one] => format!("there is {one}"),
        _ => format!("there are {}", listed.join(", ")),
    };
    format!("{what} `{name}` is unknown{meant} ({listed})")
}

/// The name that somebody who wrote `name` may have meant: `top_k` for `topk` or `TopK`.
pub fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    /// From here on names look alike; `set` and `seed` do not.
    const ALIKE: f64 = 0.75;
    let plain = |name: &str| name.to_lowercase().replace(['-', '_', '.', ' '], "");
    // Long names are no slips, and comparing them would take long.
    let wanted = plain(&name.chars().take(64).collect::<String>());
    let likeness = |known: &&'a str| (strsim::normalized_damerau_levenshtein(&wanted, &plain(known)), *known);
    let alike = known.iter().map(likeness).filter(|(likeness, _)| *likeness >= ALIKE);
    alike.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, known)| known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_told_what_may_be_meant() {
        let known = ["set", "version", "top_k", "routing"];
        for (name, meant) in [
            ("topk", Some("top_k")),
            ("Top-K", Some("top_k")),
            ("verison", Some("version")),
            ("rooting", Some("routing")),
            ("threshold", None),
            ("", None),
        ] {
            assert_eq!(nearest(name, &known), meant, "{name}");
        }
        assert_eq!(
            unknown_name("the query parameter", "topk", &known),
            "the query parameter `topk` is unknown; did you mean `top_k`? (there are `set`, `version`, `top_k`, `routing`)"
        );
        assert_eq!(unknown_name("the field", "x", &[]), "the field `x` is unknown (there are none)");
    }
    use anyhow::Context;

    #[test]
    fn causes_are_named_once() {
        let torn = || std::io::Error::other("torn");
        let printing = model_core::artifact::ArtifactError::from(torn());
        let sentence_of = |error: anyhow::Error| sentence(&error);
        assert_eq!(sentence_of(anyhow::Error::from(torn()).context("a.safetensors")), "a.safetensors: torn");
        let nested = Err::<(), _>(printing).context("a.safetensors").unwrap_err();
        assert_eq!(sentence_of(nested), "a.safetensors: cannot read the artifact: torn");
    }
}
