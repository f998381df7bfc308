use std::sync::Arc;
use model_core::artifact::*;
use model_core::config::*;
use model_core::image::Preprocess;

#[derive(Debug)]
pub struct Backbone { a: BackboneArtifact }
impl Backbone {
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ArtifactError> { Ok(Self { a: read_backbone(bytes)? }) }
    pub fn config(&self) -> &BackboneConfig { &self.a.weights.config }
    pub fn preprocess(&self) -> &Preprocess { &self.a.preprocess }
    pub fn resident_bytes(&self) -> usize { 1000 }
    pub fn pixels_len(&self) -> usize { self.config().image_size.pow(2) * 3 }
    pub fn digest(&self) -> Digest { self.a.digest }
    pub fn isa(&self) -> &'static str { "scalar" }
}
#[derive(Debug)]
pub struct ExpertSet { a: ExpertSetArtifact }
impl ExpertSet {
    pub fn from_bytes(bytes: &[u8], b: &Backbone) -> Result<Self, ArtifactError> {
        let a = read_expert_set(bytes)?;
        a.check_backbone(b.config(), b.a.digest)?;
        Ok(Self { a })
    }
    pub fn labels(&self) -> &[String] { &self.a.weights.labels }
    pub fn digest(&self) -> Digest { self.a.digest }
    pub fn config(&self) -> &ExpertConfig { &self.a.weights.config }
    pub fn resident_bytes(&self) -> usize { 1000 }
}
pub struct Row<'a> { pub set: &'a ExpertSet, pub pixels: &'a [f32], pub logits: &'a mut [f32], pub routing: Option<&'a mut [u16]> }
#[derive(Debug)]
pub struct Session {}
impl Session {
    pub fn new(_: &Arc<Backbone>, _: usize, _: usize) -> Self { Self {} }
    pub fn resident_bytes(&self) -> usize { 100 }
    pub fn forward(&mut self, rows: &mut [Row<'_>]) -> Result<(), ArtifactError> {
        for row in rows {
            for (i, logit) in row.logits.iter_mut().enumerate() {
                *logit = row.pixels.iter().enumerate().map(|(j, p)| p * ((i * j) as f32 * 0.37).sin()).sum::<f32>() / 50.0;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        Ok(())
    }
}
