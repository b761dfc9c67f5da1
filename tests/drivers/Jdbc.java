// pgjdbc.

import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.OutputStream;
import java.nio.charset.StandardCharsets;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.sql.Statement;
import java.util.Properties;
import java.util.stream.Collectors;
import java.util.stream.IntStream;
import org.postgresql.PGConnection;
import org.postgresql.copy.CopyIn;

public class Jdbc {
    static final byte[] ROW = ("x".repeat(10_000) + "\n").getBytes(StandardCharsets.US_ASCII);

    interface Step {
        String run(Connection connection) throws Exception;
    }

    static Connection connect() throws SQLException {
        var properties = new Properties();
        properties.put("user", System.getenv("PGUSER"));
        properties.put("password", System.getenv("PGPASSWORD"));
        properties.put("sslmode", System.getenv("PGSSLMODE"));
        // How long the answer to SSLRequest may take: 5 s, if nothing is said. A connection that the router holds while there is no
        // server has none yet, where TLS is passed through.
        properties.put("sslResponseTimeout", "60000");
        if (System.getenv("PGSSLROOTCERT") != null) {
            properties.put("sslrootcert", System.getenv("PGSSLROOTCERT"));
        }
        var place = System.getenv("PGHOST") + ":" + System.getenv("PGPORT") + "/" + System.getenv("PGDATABASE");
        return DriverManager.getConnection("jdbc:postgresql://" + place, properties);
    }

    static String in(Step step) throws Exception {
        try (Connection connection = connect()) {
            return step.run(connection);
        }
    }

    static String one(Connection connection, String sql, String... values) throws SQLException {
        try (PreparedStatement statement = connection.prepareStatement(sql)) {
            for (int i = 0; i < values.length; i++) {
                statement.setString(i + 1, values[i]);
            }
            ResultSet rows = statement.executeQuery();
            rows.next();
            return rows.getString(1);
        }
    }

    static void execute(Connection connection, String sql) throws SQLException {
        try (Statement statement = connection.createStatement()) {
            statement.execute(sql);
        }
    }

    static String role() throws Exception {
        return in(c -> one(c, "SELECT pg_is_in_recovery()").equals("t") ? "standby" : "primary");
    }

    static String cancel(Connection connection) throws Exception {
        try (Statement statement = connection.createStatement()) {
            var canceller = new Thread(() -> {
                try {
                    // A request may overtake the query that it is meant for.
                    while (true) {
                        Thread.sleep(200);
                        statement.cancel();
                    }
                } catch (InterruptedException | SQLException end) {
                    return;
                }
            });
            canceller.start();
            try {
                statement.execute("SELECT pg_sleep(60)");
                return "finished";
            } catch (SQLException error) {
                return error.getSQLState();
            } finally {
                canceller.interrupt();
                canceller.join();
            }
        }
    }

    static String listen(Connection connection) throws Exception {
        execute(connection, "LISTEN jdbc");
        in(other -> {
            execute(other, "NOTIFY jdbc, 'hello'");
            return "";
        });
        var heard = connection.unwrap(PGConnection.class).getNotifications(20_000);
        return heard.length == 0 ? "nothing" : heard[0].getParameter();
    }

    static String copyIn(Connection connection) throws Exception {
        execute(connection, "CREATE TEMPORARY TABLE numbers (n int)");
        var lines = IntStream.rangeClosed(1, 100_000).mapToObj(n -> n + "\n").collect(Collectors.joining());
        var bytes = new ByteArrayInputStream(lines.getBytes(StandardCharsets.US_ASCII));
        connection.unwrap(PGConnection.class).getCopyAPI().copyIn("COPY numbers FROM STDIN", bytes);
        return one(connection, "SELECT sum(n) FROM numbers");
    }

    static class Count extends OutputStream {
        long bytes;

        @Override
        public void write(int one) {
            bytes++;
        }

        @Override
        public void write(byte[] some, int offset, int length) {
            bytes += length;
        }
    }

    static String copyOut(Connection connection, String query) throws Exception {
        var count = new Count();
        connection.unwrap(PGConnection.class).getCopyAPI().copyOut("COPY (" + query + ") TO STDOUT", count);
        return Long.toString(count.bytes);
    }

    static String step(String step) throws Exception {
        return switch (step) {
            case "role" -> role();
            case "tls" -> in(c ->
                one(c, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").equals("t") ? "on" : "off");
            case "large" -> in(c -> Integer.toString(one(c, "SELECT ?::text", "x".repeat(16 << 20)).length()));
            case "copy-out" -> in(c -> copyOut(c, "SELECT generate_series(1, 100000)"));
            case "copy-in" -> in(Jdbc::copyIn);
            case "cancel" -> in(Jdbc::cancel);
            case "listen" -> in(Jdbc::listen);
            default -> "not known";
        };
    }

    static void hold(String step, Connection connection) throws Exception {
        switch (step) {
            case "hold-query" -> {
                say(step, "waiting");
                execute(connection, "SELECT pg_sleep(600)");
            }
            case "hold-copy-in" -> {
                execute(connection, "CREATE TEMPORARY TABLE lines (line text)");
                CopyIn copy = connection.unwrap(PGConnection.class).getCopyAPI().copyIn("COPY lines FROM STDIN");
                say(step, "waiting");
                while (true) {
                    copy.writeToCopy(ROW, 0, ROW.length);
                    copy.flushCopy();
                    Thread.sleep(50);
                }
            }
            case "hold-copy-out" -> {
                say(step, "waiting");
                copyOut(connection, "SELECT i, pg_sleep(0.05) FROM generate_series(1, 10000) i");
            }
            default -> {
                execute(connection, "LISTEN jdbc_held");
                say(step, "waiting");
                while (true) {
                    connection.unwrap(PGConnection.class).getNotifications(0);
                }
            }
        }
        say(step, "finished");
    }

    static void say(String step, String answer) {
        System.out.println(step + ": " + answer);
        System.out.flush();
    }

    public static void main(String[] steps) throws Exception {
        for (String step : steps) {
            if (!step.startsWith("hold-")) {
                try {
                    say(step, step(step));
                } catch (SQLException | IOException error) {
                    say(step, error.toString().replace('\n', ' '));
                }
                continue;
            }
            try (Connection connection = connect()) {
                hold(step, connection);
            } catch (SQLException error) {
                say(step, "ended");
            }
            say(step, role());
        }
        System.exit(0);
    }
}
