Feature: Traces
  What becomes of the rows that the application made.

  Scenario: Rows of the application go with ours
    Given a test within this one, which owns the audit rows
    And Ann has logged in
    And a kettle
    And a pan
    When Ann puts 1 of the kettle into the basket
    And Ann orders
    And Ann puts 1 of the pan into the basket
    And the test within is over
    Then these rows of the application went with it
      | table          | rows |
      | audit_rows     | 2    |
      | basket_items   | 1    |
      | login_sessions | 1    |
      | order_lines    | 1    |
      | orders         | 1    |
    And no row is detached

  # An audit row may be without its user, so it stays, and is reported.
  Scenario: Audit rows that nobody owns are detached
    Given a test within this one
    And Ann has logged in
    And a kettle
    When Ann puts 1 of the kettle into the basket
    And Ann orders
    And the test within is over
    Then 2 audit rows are detached
