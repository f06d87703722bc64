"""Every subject that GLAM's services publish, of both generations of their messaging module."""

from enum import StrEnum


class Subjects(StrEnum):
    """`evt.` tells a fact, `cmd.` asks for something to be done.

    Where two subjects tell one fact, the later one is its successor: publish that, and listen to
    both until no older publisher is left. `outbox contracts list` shows the pairs.

    | older subject | successor |
    |---|---|
    | `evt.billing.trial.started.v1` | `evt.billing.trial.activated.v1` |
    | `evt.billing.credits.purchased.v1` | `evt.billing.purchase.completed.v1` |
    | `evt.credit.balance.exhausted.v1` | `evt.credit.balance.depleted.v1` |
    """

    NOTIFICATION_EMAIL_SENT = "evt.notification.email.sent.v1"
    NOTIFICATION_EMAIL_FAILED = "evt.notification.email.failed.v1"
    NOTIFICATION_EMAIL_SEND = "cmd.notification.email.send.v1"

    BILLING_TRIAL_STARTED = "evt.billing.trial.started.v1"
    BILLING_TRIAL_EXPIRED = "evt.billing.trial.expired.v1"
    BILLING_CREDITS_PURCHASED = "evt.billing.credits.purchased.v1"
    BILLING_TRIAL_ACTIVATED = "evt.billing.trial.activated.v1"
    BILLING_PURCHASE_COMPLETED = "evt.billing.purchase.completed.v1"

    MERCHANT_CREATED = "evt.merchant.created.v1"
    MERCHANT_SYNCED = "evt.merchant.synced.v1"
    MERCHANT_STATUS_CHANGED = "evt.merchant.status.changed.v1"
    MERCHANT_REINSTALLED = "evt.merchant.reinstalled.v1"
    MERCHANT_UNINSTALLED = "evt.merchant.uninstalled.v1"

    CATALOG_SYNC_STARTED = "evt.catalog.sync.started.v1"
    CATAlOG_SYNC_STARTED = CATALOG_SYNC_STARTED  # the older spelling; the same member
    CATALOG_SYNC_COMPLETED = "evt.catalog.sync.completed.v1"
    CATALOG_SYNC_FAILED = "evt.catalog.sync.failed.v1"

    CREDIT_BALANCE_GRANTED = "evt.credit.balance.granted.v1"
    CREDIT_BALANCE_LOW = "evt.credit.balance.low.v1"
    CREDIT_BALANCE_EXHAUSTED = "evt.credit.balance.exhausted.v1"
    CREDIT_BALANCE_DEPLETED = "evt.credit.balance.depleted.v1"
    CREDIT_TRIAL_GRANTED = "evt.credit.trial.granted.v1"
    CREDIT_TRIAL_LOW = "evt.credit.trial.low.v1"
    CREDIT_TRIAL_EXHAUSTED = "evt.credit.trial.exhausted.v1"

    ANALYTICS_TRACKED = "evt.analytics.tracked.v1"
    ANALYTICS_AGGREGATED = "evt.analytics.aggregated.v1"

    WEBHOOK_RECEIVED = "evt.webhook.received.v1"
    WEBHOOK_PROCESSED = "evt.webhook.processed.v1"
    WEBHOOK_FAILED = "evt.webhook.failed.v1"
    WEBHOOK_APP_UNINSTALLED = "evt.webhook.app.uninstalled.v1"
