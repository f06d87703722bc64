FROM python:3.13-slim
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY migrations migrations
COPY outbox outbox
RUN pip install --no-cache-dir '.[metrics]'
USER nobody
CMD ["outbox-relay"]
