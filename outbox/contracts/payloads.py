"""What GLAM's events carry; each payload is registered for its subjects.

Those marked *new* had no payload in the older modules: a field for each fact that a consumer of the
subject needs. All others keep the older names, types and defaults to the letter.
"""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from pydantic import BaseModel, Field

from outbox.contracts.subjects import Subjects
from outbox.registry import register


class MerchantIdentifiers(BaseModel):
    """Which merchant an event is about, here and on its platform."""

    merchant_id: UUID
    platform_name: str
    platform_shop_id: str
    domain: str


class BaseEventPayload(BaseModel):
    """What every payload holds."""

    identifiers: MerchantIdentifiers


def by_merchant(payload: BaseEventPayload) -> str:
    """Return the ordering key of GLAM's events: all of one merchant keep their order."""
    return str(payload.identifiers.merchant_id)


class ErrorPayload(BaseEventPayload):
    """What failed; on `dlq.` subjects, and the base of failure events."""

    error_code: str
    error_message: str
    failed_operation: str
    retry_count: int = 0
    max_retries: int = 3
    original_data: dict[str, Any] | None = None


# ---- catalog ---------------------------------------------------------------------------------


@register(Subjects.CATALOG_SYNC_STARTED, key=by_merchant)
class CatalogSyncStartedPayload(BaseEventPayload):
    """A catalog's synchronisation has begun."""

    sync_id: UUID
    total_items: int
    status: str


@register(Subjects.CATALOG_SYNC_COMPLETED, key=by_merchant)
class CatalogSyncCompletedPayload(BaseEventPayload):
    """A catalog's synchronisation has ended well."""

    sync_id: UUID
    total_items: int
    status: str
    first_sync: bool = False
    has_changes: bool = False
    email: str | None = None


@register(Subjects.CATALOG_SYNC_FAILED, key=by_merchant)
class CatalogSyncFailedPayload(ErrorPayload):
    """A catalog's synchronisation has failed; an `ErrorPayload` that names the run (*new*)."""

    sync_id: UUID | None = None


# ---- credit ----------------------------------------------------------------------------------


@register(Subjects.CREDIT_BALANCE_GRANTED, key=by_merchant)
class CreditBalanceGrantedPayload(BaseEventPayload):
    """Credits were added to the merchant's balance."""

    amount: float
    new_balance: float
    email: str


@register(Subjects.CREDIT_BALANCE_LOW, key=by_merchant)
class CreditBalanceLowPayload(BaseEventPayload):
    """The balance fell below the merchant's threshold."""

    balance: float
    email: str


@register(Subjects.CREDIT_BALANCE_DEPLETED, key=by_merchant)
@register(
    Subjects.CREDIT_BALANCE_EXHAUSTED,
    key=by_merchant,
    deprecated_by=Subjects.CREDIT_BALANCE_DEPLETED,
)
class CreditBalanceExhaustedPayload(BaseEventPayload):
    """The balance is used up; `depleted` is the successor of `exhausted`."""

    exhausted_at: datetime
    email: str


@register(Subjects.CREDIT_TRIAL_GRANTED, key=by_merchant)
class CreditTrialGrantedPayload(BaseEventPayload):
    """Trial credits were granted."""

    amount: float
    email: str


@register(Subjects.CREDIT_TRIAL_LOW, key=by_merchant)
class CreditTrialLowPayload(BaseEventPayload):
    """Few trial credits are left."""

    balance: float
    email: str


@register(Subjects.CREDIT_TRIAL_EXHAUSTED, key=by_merchant)
class CreditTrialExhaustedPayload(BaseEventPayload):
    """The trial credits are used up."""

    exhausted_at: datetime
    email: str


# ---- merchant --------------------------------------------------------------------------------


class MerchantStatus(StrEnum):
    """Where a merchant stands with the app."""

    PENDING = "PENDING"
    ACTIVE = "ACTIVE"
    PAUSED = "PAUSED"
    SUSPENDED = "SUSPENDED"
    UNINSTALLED = "UNINSTALLED"


@register(Subjects.MERCHANT_CREATED, key=by_merchant)
class MerchantCreatedPayload(BaseEventPayload):
    """A merchant has installed the app for the first time."""

    name: str
    email: str
    primary_domain: str | None
    currency: str
    country: str
    platform_version: str | None
    scopes: str


class MerchantProfile(MerchantCreatedPayload):
    """What is known of a merchant that exists."""

    status: MerchantStatus
    last_synced_at: datetime | None
    created_at: datetime
    updated_at: datetime


@register(Subjects.MERCHANT_SYNCED, key=by_merchant)
class MerchantSyncedPayload(MerchantProfile):
    """The merchant's data was read from its platform."""


@register(Subjects.MERCHANT_REINSTALLED, key=by_merchant)
class MerchantReinstalledPayload(MerchantProfile):
    """A merchant that had left has installed the app again."""


@register(Subjects.MERCHANT_UNINSTALLED, key=by_merchant)
class MerchantUninstalledPayload(BaseEventPayload):
    """A merchant has removed the app."""

    status: str = "UNINSTALLED"
    updated_at: datetime


@register(Subjects.MERCHANT_STATUS_CHANGED, key=by_merchant)
class MerchantStatusChangedPayload(MerchantProfile):
    """A merchant's status is another one now."""

    from_status: MerchantStatus
    to_status: MerchantStatus


# ---- notification ----------------------------------------------------------------------------


@register(Subjects.NOTIFICATION_EMAIL_SEND, key=by_merchant)
class EmailSendPayload(BaseEventPayload):
    """Asks for an e-mail of a template to be sent (*new*)."""

    notification_id: UUID
    template_type: str
    recipient_email: str
    variables: dict[str, Any] = Field(default_factory=dict)


@register(Subjects.NOTIFICATION_EMAIL_SENT, key=by_merchant)
class EmailSentPayload(BaseEventPayload):
    """An e-mail was taken by the provider."""

    notification_id: UUID
    template_type: str
    recipient_email: str
    provider: str
    provider_message_id: str


@register(Subjects.NOTIFICATION_EMAIL_FAILED, key=by_merchant)
class EmailFailedPayload(BaseEventPayload):
    """An e-mail could not be sent."""

    notification_id: UUID
    template_type: str
    recipient_email: str
    error_code: str
    error_message: str
    retry_count: int = 0


# ---- billing ---------------------------------------------------------------------------------


@register(Subjects.BILLING_TRIAL_ACTIVATED, key=by_merchant)
@register(
    Subjects.BILLING_TRIAL_STARTED, key=by_merchant, deprecated_by=Subjects.BILLING_TRIAL_ACTIVATED
)
class TrialActivatedPayload(BaseEventPayload):
    """A trial has begun; `activated` is the successor of `started` (*new*)."""

    trial_id: UUID
    plan_name: str
    credits: float
    activated_at: datetime
    ends_at: datetime
    email: str


@register(Subjects.BILLING_TRIAL_EXPIRED, key=by_merchant)
class TrialExpiredPayload(BaseEventPayload):
    """A trial has ended without a purchase (*new*)."""

    trial_id: UUID
    plan_name: str
    expired_at: datetime
    email: str


@register(Subjects.BILLING_PURCHASE_COMPLETED, key=by_merchant)
@register(
    Subjects.BILLING_CREDITS_PURCHASED,
    key=by_merchant,
    deprecated_by=Subjects.BILLING_PURCHASE_COMPLETED,
)
class PurchaseCompletedPayload(BaseEventPayload):
    """Credits were bought and paid for (*new*).

    `purchase completed` is the successor of `credits purchased`.
    """

    purchase_id: UUID
    credits: float
    price: float
    currency: str
    platform_charge_id: str | None = None
    purchased_at: datetime
    email: str


# ---- analytics -------------------------------------------------------------------------------


@register(Subjects.ANALYTICS_TRACKED, key=by_merchant)
class AnalyticsTrackedPayload(BaseEventPayload):
    """Something that a shopper or merchant did (*new*)."""

    name: str
    occurred_at: datetime
    session_id: str | None = None
    properties: dict[str, Any] = Field(default_factory=dict)


@register(Subjects.ANALYTICS_AGGREGATED, key=by_merchant)
class AnalyticsAggregatedPayload(BaseEventPayload):
    """A figure of a merchant over a period (*new*)."""

    metric: str
    value: float
    events_counted: int
    period_start: datetime
    period_end: datetime


# ---- webhook ---------------------------------------------------------------------------------


class WebhookPayload(BaseEventPayload):
    """Which webhook of the platform an event is about (*new*)."""

    webhook_id: str  # the platform's own id of the delivery, the same when it is repeated
    topic: str


@register(Subjects.WEBHOOK_RECEIVED, key=by_merchant)
class WebhookReceivedPayload(WebhookPayload):
    """A webhook's signature was checked and its body kept (*new*)."""

    received_at: datetime
    body: dict[str, Any] = Field(default_factory=dict)


@register(Subjects.WEBHOOK_PROCESSED, key=by_merchant)
class WebhookProcessedPayload(WebhookPayload):
    """A webhook has had its effect (*new*)."""

    processed_at: datetime


@register(Subjects.WEBHOOK_FAILED, key=by_merchant)
class WebhookFailedPayload(ErrorPayload):
    """A webhook could not be processed; an `ErrorPayload` that names the webhook (*new*)."""

    webhook_id: str
    topic: str


@register(
    Subjects.WEBHOOK_APP_UNINSTALLED,
    key=lambda payload: f"{payload.platform_name}/{payload.platform_shop_id}",
)
class WebhookAppUninstalledV1(BaseModel):
    """The platform says that the app was removed; which merchant that is, others know."""

    platform_name: str
    platform_shop_id: str
    domain: str | None = None
    occurred_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
