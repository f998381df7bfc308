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

#[cfg(test)]
mod tests {
    use super::*;
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
