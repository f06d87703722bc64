"""Every subject of GLAM has a payload, a frozen schema and a sample; older fields are kept."""

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel, ValidationError

from outbox import contracts
from outbox.contracts import MerchantIdentifiers, MerchantStatus, Subjects, WebhookAppUninstalledV1
from outbox.operate.schemas import freeze
from outbox.registry import registry

FROZEN = json.loads(Path(contracts.__file__).with_name("schemas.json").read_text())
TIME = "2026-11-25T07:00:00Z"
ID = "018f0000-0000-7000-8000-000000000001"
MERCHANT = {
    "merchant_id": ID,
    "platform_name": "shopify",
    "platform_shop_id": "42",
    "domain": "tea.example",
}
CREATED: dict[str, Any] = {
    "name": "Tea & Sons",
    "email": "owner@tea.example",
    "primary_domain": None,
    "currency": "EUR",
    "country": "DE",
    "platform_version": None,
    "scopes": "read_products",
}
PROFILE = CREATED | {
    "status": "ACTIVE",
    "last_synced_at": None,
    "created_at": TIME,
    "updated_at": TIME,
}
SYNC = {"sync_id": ID, "total_items": 3, "status": "done"}
EMAIL = {"email": "owner@tea.example"}
MAIL = {"notification_id": ID, "template_type": "welcome", "recipient_email": "owner@tea.example"}
ERROR = {"error_code": "E1", "error_message": "no", "failed_operation": "sync"}
TRIAL = {"trial_id": ID, "plan_name": "basic"} | EMAIL
STARTED = TRIAL | {"credits": 10, "activated_at": TIME, "ends_at": TIME}
PURCHASE = {"purchase_id": ID, "credits": 5, "price": 9.5, "currency": "EUR", "purchased_at": TIME}
HOOK = {"webhook_id": "w1", "topic": "app/uninstalled"}
# What is required of each subject's payload beside the identifiers, and nothing more.
REQUIRED: dict[Subjects, dict[str, Any]] = {
    Subjects.NOTIFICATION_EMAIL_SENT: MAIL | {"provider": "p", "provider_message_id": "1"},
    Subjects.NOTIFICATION_EMAIL_FAILED: MAIL | {"error_code": "E1", "error_message": "no"},
    Subjects.NOTIFICATION_EMAIL_SEND: MAIL,
    Subjects.BILLING_TRIAL_STARTED: STARTED,
    Subjects.BILLING_TRIAL_ACTIVATED: STARTED,
    Subjects.BILLING_TRIAL_EXPIRED: TRIAL | {"expired_at": TIME},
    Subjects.BILLING_CREDITS_PURCHASED: PURCHASE | EMAIL,
    Subjects.BILLING_PURCHASE_COMPLETED: PURCHASE | EMAIL,
    Subjects.MERCHANT_CREATED: CREATED,
    Subjects.MERCHANT_SYNCED: PROFILE,
    Subjects.MERCHANT_REINSTALLED: PROFILE,
    Subjects.MERCHANT_STATUS_CHANGED: PROFILE | {"from_status": "ACTIVE", "to_status": "PAUSED"},
    Subjects.MERCHANT_UNINSTALLED: {"updated_at": TIME},
    Subjects.CATALOG_SYNC_STARTED: SYNC,
    Subjects.CATALOG_SYNC_COMPLETED: SYNC,
    Subjects.CATALOG_SYNC_FAILED: ERROR,
    Subjects.CREDIT_BALANCE_GRANTED: EMAIL | {"amount": 5, "new_balance": 7.5},
    Subjects.CREDIT_BALANCE_LOW: EMAIL | {"balance": 0.5},
    Subjects.CREDIT_BALANCE_EXHAUSTED: EMAIL | {"exhausted_at": TIME},
    Subjects.CREDIT_BALANCE_DEPLETED: EMAIL | {"exhausted_at": TIME},
    Subjects.CREDIT_TRIAL_GRANTED: EMAIL | {"amount": 5},
    Subjects.CREDIT_TRIAL_LOW: EMAIL | {"balance": 0.5},
    Subjects.CREDIT_TRIAL_EXHAUSTED: EMAIL | {"exhausted_at": TIME},
    Subjects.ANALYTICS_TRACKED: {"name": "viewed", "occurred_at": TIME},
    Subjects.ANALYTICS_AGGREGATED: {
        "metric": "views",
        "value": 3,
        "events_counted": 3,
        "period_start": TIME,
        "period_end": TIME,
    },
    Subjects.WEBHOOK_RECEIVED: HOOK | {"received_at": TIME},
    Subjects.WEBHOOK_PROCESSED: HOOK | {"processed_at": TIME},
    Subjects.WEBHOOK_FAILED: HOOK | ERROR,
    Subjects.WEBHOOK_APP_UNINSTALLED: {"platform_name": "shopify", "platform_shop_id": "42"},
}


def payload_of(subject: Subjects) -> type[BaseModel]:
    found = registry.of(subject)
    assert found is not None
    return found.payload


def sample(subject: Subjects) -> dict[str, Any]:
    if subject is Subjects.WEBHOOK_APP_UNINSTALLED:
        return REQUIRED[subject]
    return {"identifiers": MERCHANT} | REQUIRED[subject]


def test_each_subject_is_sampled_here() -> None:
    assert set(REQUIRED) == set(Subjects)
    assert len(Subjects) == 29


@pytest.mark.parametrize("subject", Subjects)
def test_payload_needs_exactly_what_the_contract_says(subject: Subjects) -> None:
    payload = payload_of(subject)
    whole = sample(subject)
    assert set(payload.model_validate(whole).model_fields_set) == set(whole)
    for name in whole:
        with pytest.raises(ValidationError):
            payload.model_validate({key: value for key, value in whole.items() if key != name})


@pytest.mark.parametrize("subject", Subjects)
def test_schema_is_frozen_and_the_key_is_the_merchants(subject: Subjects) -> None:
    assert FROZEN[subject] == freeze(registry)[subject]
    found = registry.of(subject)
    assert found is not None
    assert found.key is not None
    wanted = "shopify/42" if subject is Subjects.WEBHOOK_APP_UNINSTALLED else ID
    assert found.key(found.payload.model_validate(sample(subject))) == wanted


@pytest.mark.parametrize(
    ("subject", "successor"),
    [
        (Subjects.BILLING_TRIAL_STARTED, Subjects.BILLING_TRIAL_ACTIVATED),
        (Subjects.BILLING_CREDITS_PURCHASED, Subjects.BILLING_PURCHASE_COMPLETED),
        (Subjects.CREDIT_BALANCE_EXHAUSTED, Subjects.CREDIT_BALANCE_DEPLETED),
    ],
)
def test_later_name_of_a_fact_succeeds_the_older_one(
    subject: Subjects, successor: Subjects
) -> None:
    found = registry.of(subject)
    assert found is not None
    assert found.deprecated_by == successor
    assert payload_of(successor) is found.payload


def test_misspelt_member_is_the_same_subject() -> None:
    assert Subjects["CATAlOG_SYNC_STARTED"] is Subjects["CATALOG_SYNC_STARTED"]


def test_defaults_are_those_of_the_older_modules() -> None:
    completed = contracts.CatalogSyncCompletedPayload.model_validate(
        sample(Subjects.CATALOG_SYNC_COMPLETED)
    )
    assert (completed.first_sync, completed.has_changes, completed.email) == (False, False, None)
    error = contracts.ErrorPayload.model_validate({"identifiers": MERCHANT} | ERROR)
    assert (error.retry_count, error.max_retries, error.original_data) == (0, 3, None)
    gone = contracts.MerchantUninstalledPayload.model_validate(
        sample(Subjects.MERCHANT_UNINSTALLED)
    )
    assert gone.status == "UNINSTALLED"
    webhook = WebhookAppUninstalledV1(platform_name="shopify", platform_shop_id="42")
    assert webhook.domain is None
    assert webhook.occurred_at.utcoffset() is not None
    assert [str(each) for each in MerchantStatus] == [
        "PENDING",
        "ACTIVE",
        "PAUSED",
        "SUSPENDED",
        "UNINSTALLED",
    ]


def test_merchant_id_is_made_a_uuid_of_text() -> None:
    assert MerchantIdentifiers.model_validate(MERCHANT).merchant_id == UUID(ID)
