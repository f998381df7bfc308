//! `/backbones`: what expert sets rest on.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use model_core::artifact::store_layout;
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Admin;
use super::body;
use super::error::ApiError;
use super::extract::{ApiPath, RequestContext};
use super::openapi::{ADMIN, LIFECYCLE, commands, errors};
use super::sets::{UPLOAD, receive};
use crate::app::AppState;
use crate::keys::Caller;
use crate::sets::descriptor::BackboneDescriptor;

/// The routes of this resource.
pub fn router() -> OpenApiRouter<AppState> {
    OpenApiRouter::default().routes(routes!(list_backbones)).routes(routes!(upload_backbone))
}

/// A backbone of the store.
#[derive(Debug, Serialize, ToSchema)]
struct BackboneView {
    name: String,
    /// The content digest, by which expert sets name it.
    digest: String,
    /// Pixels of a side of its input.
    image_size: usize,
    /// Bytes when resident, as far as the file's header tells.
    resident_bytes: usize,
}

impl From<Arc<BackboneDescriptor>> for BackboneView {
    fn from(backbone: Arc<BackboneDescriptor>) -> Self {
        Self {
            name: backbone.name.clone(),
            digest: backbone.digest.to_string(),
            image_size: backbone.config.image_size,
            resident_bytes: backbone.resident_bytes,
        }
    }
}

fn example_view() -> Value {
    json!({
        "name": "photo",
        "digest": "0df914bb0fe21a7896f9706d253c181f3e1c33cff8595d907ee4bfca760ad007",
        "image_size": 192,
        "resident_bytes": 3909316,
    })
}

/// Every backbone that sets may rest on.
#[utoipa::path(
    get,
    path = "/backbones",
    operation_id = "list_backbones",
    tag = "sets",
    responses((status = 200, description = "Done.", body = Vec<BackboneView>, example = json!([example_view()]))),
    extensions(("x-codeSamples" = json!(commands(&["curl http://127.0.0.1:8000/backbones"])))),
)]
async fn list_backbones(State(app): State<AppState>) -> Json<Vec<BackboneView>> {
    let mut backbones = app.classifier.registry.backbones();
    backbones.sort_by(|a, b| a.name.cmp(&b.name));
    Json(backbones.into_iter().map(BackboneView::from).collect())
}

/// Upload a backbone for sets to rest on.
///
/// The file is checked from its first byte to its last before it takes its place. A backbone never changes under its name,
/// because sets name it by its contents; the same contents again are answered 200 with the name that they have.
#[utoipa::path(
    put,
    path = "/backbones/{name}",
    operation_id = "upload_backbone",
    tag = "sets",
    request_body(content(("application/octet-stream"))),
    responses(
        (status = 200, description = "It was here already.", body = BackboneView, example = json!(example_view())),
        (status = 201, description = "It is new.", body = BackboneView, example = json!(example_view())),
    ),
    extensions(
        ("x-errors" = json!(errors(&[ADMIN, LIFECYCLE, UPLOAD]))),
        ("x-codeSamples" = json!(commands(&["curl -H \"X-Api-Key: $(butterflyvit admin-key)\" -T photo.safetensors http://127.0.0.1:8000/backbones/photo"]))),
    ),
)]
async fn upload_backbone(
    State(app): State<AppState>,
    context: RequestContext,
    name: ApiPath<String>,
    admin: Result<Admin, ApiError>,
    headers: HeaderMap,
    mut body: Body,
) -> Result<Response, ApiError> {
    let name = name.0;
    let published = async {
        let Admin(by) = admin?;
        let _entry = app.classifier.admission.enter(&Caller::default(), context.client)?;
        if !store_layout::is_valid_name(&name) {
            return Err(ApiError::invalid(store_layout::NAME_RULE));
        }
        let upload = receive(&app, &headers, &mut body).await?;
        let (backbone, is_new) = app.catalog.publish_backbone(upload, &name).await?;
        tracing::info!(by = &*by, backbone = backbone.name, is_new, "backbone uploaded");
        Ok((backbone, is_new))
    };
    match published.await {
        Ok((backbone, is_new)) => {
            let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
            Ok((status, Json(BackboneView::from(backbone))).into_response())
        }
        Err(error) => {
            body::linger(body).await;
            Err(error)
        }
    }
}
