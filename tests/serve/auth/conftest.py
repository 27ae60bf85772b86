from tests.serve.services import keys_db, postgres_server, postgres_url, redis_server, redis_url

__all__ = ["keys_db", "postgres_server", "postgres_url", "redis_server", "redis_url"]
