"""What Alembic runs to migrate: on the connection that `store.migrate` gives it."""

from __future__ import annotations

from alembic import context

from mechmerge.service.tables import Base

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    # SQLite cannot alter a column in place.
    render_as_batch=connection.dialect.name == "sqlite",
)
context.run_migrations()
